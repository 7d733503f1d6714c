"""Resemblance: pools whose tasks are near-duplicates, related, unrelated, or alike to what the base can do."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.experiments import pools
from jobs.experiments.charts import bars, pairs
from jobs.experiments.confusables import OWN, PROMPTS, STEPS, mean, routing_accuracy
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table, Target
from jobs.experiments.seeds import of_results, ratio, shown
from jobs.experiments.settings import stream, task
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.data.demo.confusable import REPORTED
from pipeline.evaluation.matrix import BASE
from pipeline.learning.baselines import ROUTERS
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession

ASKED = 40
"""Prompts per task."""
TASKS = 8
"""Tasks of a pool."""
LEVELS = {
    "near-duplicate, same words": "order",
    "near-duplicate, paraphrased": "paraphrase",
    "related, same pictures": "pictures",
    "alike to the base": "domain",
    "unrelated": "unrelated",
}
"""How tasks resemble one another, and the stream that they are of."""
METHODS = ("prompt", "prompt_without_null", "two_level")
"""Routers; without the null expert prompts beyond all thresholds go to the base."""
KEYS = ("own", "oracle", "own_to_oracle", "base_kept", "routing", "base_routing")


def of_level(kind: str) -> list[str]:
    """Returns the tasks of a pool; unrelated ones are synthetic, with words of their own each."""
    return [f"{'synthetic' if kind == 'unrelated' else kind}_{number:03d}" for number in range(TASKS)]


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns one run: the tasks of all levels; each level then is a pool of its own."""
    names = [name for kind in LEVELS.values() for name in of_level(kind)]
    config = configure("resemblance", seed, stream([task(name, prompts=ASKED) for name in names]), *OWN)
    return [Run("resemblance", seed, config, measure)]


def measure(session: StreamSession, learned: LearnResult) -> Result:
    """Evaluates a pool per level with each router, and all tasks in one pool."""
    by_kind = {kind: [name for name in of_level(kind) if name in learned.pool.names] for kind in LEVELS.values()}
    levels = {kind: names for kind, names in by_kind.items() if names}
    levels["reported"] = [name for kind in REPORTED for name in levels.get(kind, ())]
    levels["all"] = learned.pool.names
    names = [*learned.pool.names, *BENCHMARKS]
    alone = pools.oracle(session, learned.pool, names).accuracies()
    base = mean(session.evaluate(names, None, BASE, who="the base").accuracies(), BENCHMARKS)
    return {
        kind: {
            method: _of_pool(session, learned, tasks, method, alone, base)
            for method in (METHODS if kind != "all" else METHODS[:2])
        }
        for kind, tasks in levels.items()
    }


def _of_pool(
    session: StreamSession,
    learned: LearnResult,
    tasks: Sequence[str],
    method: str,
    alone: Mapping[str, float],
    base: float,
) -> Result:
    pool = pools.part(learned.pool, tasks, null=not method.endswith("without_null"))
    pool = pool.routed_by(**ROUTERS[method.removesuffix("_without_null")])
    evaluation = pools.routed(session, pool, [*tasks, *BENCHMARKS], method)
    accuracy = evaluation.accuracies()
    return {
        "own": mean(accuracy, tasks),
        "oracle": mean(alone, tasks),
        "own_to_oracle": ratio(mean(accuracy, tasks), mean(alone, tasks)),
        "base_kept": ratio(mean(accuracy, BENCHMARKS), base),
        "routing": routing_accuracy(evaluation, tasks, tasks),
        "base_routing": routing_accuracy(evaluation, tasks, BENCHMARKS),
    }


def summarise(results: Results) -> Figures:
    """Returns the figures by level and router."""
    by_seed = results["resemblance"]
    return {
        kind: {method: of_results([result[kind][method] for result in by_seed], *KEYS) for method in methods}
        for kind, methods in by_seed[0].items()
        if kind != "seconds"
    }


def tables(figures: Figures) -> list[Table]:
    """Returns a table per router."""
    header = ["tasks", "new tasks", "oracle", "of oracle", "base abilities kept", "routed right: tasks", "base"]
    labels = {kind: level for level, kind in LEVELS.items()}
    labels |= {"reported": "the three reported streams together", "all": "all together"}
    titles = dict(
        zip(METHODS, ("Prompt router", "Prompt router without base prompts", "Two-level router"), strict=True)
    )
    return [
        Table(
            title,
            header,
            [
                [label, *(shown(figures[kind][method], key) for key in KEYS)]
                for kind, label in labels.items()
                if method in figures.get(kind, {})
            ],
        )
        for method, title in titles.items()
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns tasks and base abilities by level, for the default router."""
    levels = {level: kind for level, kind in LEVELS.items() if kind in figures}

    def draw() -> Any:
        of_levels = [figures[kind]["prompt"] for kind in levels.values()]
        without = [figures[kind]["prompt_without_null"] for kind in levels.values()]
        series = {
            "new tasks, of oracle": pairs(of_levels, "own_to_oracle"),
            "base abilities kept": pairs(of_levels, "base_kept"),
            "new tasks, no base prompts": pairs(without, "own_to_oracle"),
            "base abilities, no base prompts": pairs(without, "base_kept"),
        }
        return bars(list(levels), series)

    caption = f"Pools of {TASKS} tasks each, prompt router with base prompts and with thresholds alone."
    return [Chart("resemblance", "By resemblance", caption, draw)]


EXPERIMENT = Experiment(
    version=1,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    targets=(
        Target("reported.prompt.own_to_oracle_mean", ">=", 0.995),
        Target("reported.prompt.base_kept_mean", ">=", 0.995),
        Target("reported.prompt_without_null.own_to_oracle_mean", ">=", 0.995),
        Target("reported.prompt_without_null.base_kept_mean", ">=", 0.995),
    ),
    notes=(
        f"{TASKS} tasks of each stream, {STEPS} steps of 16 rows each, {ASKED} prompts per task, {PROMPTS} per ability. "
        "Of tasks that ask with the same words in another order the mean of the words' embeddings is the same.",
        "The stream `domain` (alike to the base) may be tuned on; the three others are for reporting.",
    ),
)
