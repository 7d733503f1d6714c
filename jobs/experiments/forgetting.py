"""Forgetting: the routed pool beside what one would do without it, six tasks in two orders."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from jobs.experiments.charts import bars, pairs
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table, Target
from jobs.experiments.seeds import over_seeds, ratio, shown
from jobs.experiments.settings import DEMO_STEPS, DEMO_TASKS, stream, task
from pipeline.evaluation.plots import METHODS
from pipeline.learning.baselines import ROUTERS, compare_methods
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession

PROMPTS = 80
"""Prompts per task and ability."""
FORWARD, BACKWARD = "forgetting-forward", "forgetting-backward"
FROM_TASK_TO_TASK = ("sequential", "replay", "ewc")
"""Methods for which the order of the tasks matters; all others are the same in both."""
METRICS = ("new", "base_kept", "backward_transfer", "forgetting")


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns a run per order; the second one finds the first one's experts."""
    own = f"expert.steps={DEMO_STEPS}", f"evaluation.limit={PROMPTS}"
    both = ((FORWARD, DEMO_TASKS, _forward), (BACKWARD, DEMO_TASKS[::-1], _backward))
    return [
        Run(label, seed, configure(label, seed, stream([task(name) for name in names]), *own), measure)
        for label, names, measure in both
    ]


def _forward(session: StreamSession, learned: LearnResult) -> Result:
    return _measure(session, learned, (*FROM_TASK_TO_TASK, "multitask", "multitask_base"), tuple(ROUTERS))


def _backward(session: StreamSession, learned: LearnResult) -> Result:
    return _measure(session, learned, FROM_TASK_TO_TASK, ("prompt",))


def _measure(session: StreamSession, learned: LearnResult, fine_tuned: Sequence[str], routers: Sequence[str]) -> Result:
    methods = compare_methods(session, learned, fine_tuned=fine_tuned, routers=routers, over_time=True)
    methods["prompt"]["continual"] = learned.summary["continual"]
    base = methods["base"]["base_abilities"]
    return {
        name: {
            "new": method["new"],
            "base_abilities": method["base_abilities"],
            "base_kept": ratio(method["base_abilities"], base),
            "samples": method["samples"],
            "training_seconds": method["seconds"],
            "columns": method["columns"],
            **{key: method.get("continual", {}).get(key) for key in ("backward_transfer", "forgetting")},
        }
        for name, method in methods.items()
    }


def summarise(results: Results) -> Figures:
    """Returns per method the figures over seeds; each seed's is the mean of the orders that were done."""
    by_seed = list(zip(*results.values(), strict=True))
    names = dict.fromkeys(name for of_seed in by_seed for result in of_seed for name in result if name != "seconds")
    figures: Figures = {}
    for name in (name for name in METHODS if name in names):
        values = {key: [_mean(of_seed, name, key) for of_seed in by_seed] for key in (*METRICS, "base_abilities")}
        figures[name] = over_seeds(values)
        if name in FROM_TASK_TO_TASK:
            figures[name]["orders_apart_mean"] = fmean(_apart(of_seed, name) for of_seed in by_seed)
        methods = [result[name] for of_seed in by_seed for result in of_seed if name in result]
        figures[name] |= {key: fmean(method[key] for method in methods) for key in ("samples", "training_seconds")}
        figures[name]["tasks"] = {
            column: fmean(method["columns"][column] for method in methods) for column in methods[0]["columns"]
        }
    return figures


def _mean(of_seed: Sequence[Mapping[str, Any]], name: str, key: str) -> float | None:
    values = [result[name][key] for result in of_seed if name in result]
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _apart(of_seed: Sequence[Mapping[str, Any]], name: str) -> float:
    """Returns how far accuracies on new tasks of the two orders are apart."""
    values = [result[name]["new"] for result in of_seed if name in result]
    return max(values) - min(values)


def tables(figures: Figures) -> list[Table]:
    """Returns the methods, and their accuracy by task."""
    names = [name for name in METHODS if name in figures]
    labels = {name: METHODS[name].replace("\n", " ") for name in names}
    ours = frozenset(i for i, name in enumerate(names) if name == "prompt")
    rows = [
        [
            labels[name],
            *(
                shown(figures[name], key)
                for key in ("new", "base_abilities", "base_kept", "backward_transfer", "forgetting")
            ),
            f"{figures[name]['samples']:,.0f}",
        ]
        for name in names
    ]
    columns = [column for column in figures["base"]["tasks"] if column in DEMO_TASKS]
    by_task = [[labels[name], *(f"{100 * figures[name]['tasks'][column]:.1f}" for column in columns)] for name in names]
    header = ["method", "new tasks", "base abilities", "of the base's", "backward transfer", "forgetting", "samples"]
    note = (
        "Backward transfer and forgetting by the definitions of Lopez-Paz and Ranzato (2017) and Chaudhry et al. (2018); they "
        "need an order, which multi-task training does not have. Samples count every row each time that it is trained on."
    )
    return [
        Table("Methods", header, rows, note, ours),
        Table("Accuracy by task, percent", ["method", *columns], by_task, "Mean over seeds and orders.", ours),
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns new tasks and base abilities of all methods."""
    names = [name for name in METHODS if name in figures]
    of_methods = [figures[name] for name in names]

    def draw() -> Any:
        series = {"new tasks": pairs(of_methods, "new"), "base abilities": pairs(of_methods, "base_abilities")}
        return bars([METHODS[name] for name in names], series)

    caption = "Accuracy after the last task; lines are standard deviations over seeds."
    return [Chart("methods", "Methods side by side", caption, draw)]


EXPERIMENT = Experiment(
    version=1,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    targets=(
        Target("prompt.new_mean", ">=", "multitask.new_mean"),
        Target("prompt.base_kept_mean", ">=", 0.995),
    ),
    notes=(
        f"Six tasks of the demo, {DEMO_STEPS} steps each for every method (multi-task: {len(DEMO_TASKS)} times as many on "
        f"all rows), {PROMPTS} held-out prompts per task and ability. Methods that go from task to task learn "
        "them in the demo's order and in the opposite one; a seed's figure is the mean of both. Experts are the same in both.",
        "Replay sees 5 % of each earlier task's rows again. EWC adds a penalty on moving weights that earlier tasks need. "
        "Multi-task training with base prompts sees the base's own questions and answers too, which users of a checkpoint "
        "seldom have.",
    ),
)
