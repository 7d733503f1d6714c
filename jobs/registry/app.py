"""Looks at the registry and decides what is in use.

pointsman registry list                              pools, experts, bases
pointsman registry show tiny.pool.demo@champion      one version in full
pointsman registry diff tiny.pool.demo/5 tiny.pool.demo/6
pointsman registry promote tiny.pool.demo 6          this version is the champion now
pointsman registry rollback tiny.pool.demo           the champion before it is, again
pointsman registry retire tiny.pool.demo clock       the base answers in place of an expert
pointsman registry replace tiny.pool.demo tiny.expert.clock/1    another version of an expert takes its place
pointsman registry export tiny.pool.demo@champion --format peft --out experts   for stock PEFT, vLLM, or another machine
pointsman registry import FOLDER task.yaml --pool tiny.pool.demo      a PEFT LoRA of somebody else becomes an expert
pointsman registry gc                                what no pool needs, and whether to delete it
pointsman registry migrate --dry-run                 what an earlier release registered gets its new names
"""

from jobs.lazy import Lazy, lazy_group

COMMANDS = {
    "list": Lazy("jobs.registry.browse:list_models", "List pools, experts and bases."),
    "show": Lazy("jobs.registry.browse:show", "Show a version: accuracies, experts, origin."),
    "diff": Lazy("jobs.registry.browse:diff", "Compare two versions of pools."),
    "promote": Lazy("jobs.registry.decide:promote", "Make a version of a pool the champion."),
    "rollback": Lazy("jobs.registry.decide:rollback", "Make the champion before it the champion again."),
    "retire": Lazy("jobs.registry.retire:retire", "Let the base answer in place of an expert."),
    "replace": Lazy("jobs.registry.replace:replace", "Put another version of an expert in its place."),
    "export": Lazy("jobs.registry.export:export", "Write a pool or an expert for PEFT, vLLM or another machine."),
    "import": Lazy("jobs.registry.import_adapter:import_adapter", "Make somebody's PEFT LoRA an expert of a pool."),
    "gc": Lazy("jobs.registry.clean:gc", "Show what no pool needs, and delete it if confirmed."),
    "migrate": Lazy("jobs.registry.decide:migrate", "Give what an earlier release registered its new names."),
}

app = lazy_group(COMMANDS, "Browse the registry and decide which pool is in use.")
