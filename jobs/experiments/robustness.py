"""Robustness: tasks from few or many rows, unbalanced or wrongly labelled ones, and asked under other circumstances."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from jobs.experiments import pools
from jobs.experiments.charts import bars, lines, pairs
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table
from jobs.experiments.seeds import of_results, ratio, shown
from jobs.experiments.settings import DEMO_STEPS, DEMO_TASKS, column, stream, task
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.data.demo.variants import ILLUSTRATED
from pipeline.evaluation.matrix import BASE
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession

PROMPTS = 60
"""Prompts per task, ability and circumstance."""
ROWS = (32, 128, 512, 2048, 4096)
"""Rows that a task is learned from."""
VARIED = "renamed"
"""The task whose rows are varied."""
NOISE = {"noisy10": 0.1, "noisy30": 0.3}
"""Shares of wrong answers among its rows."""
SMALL, LARGE = "later", "clock"
"""Two tasks about the same pictures; of the small one there are a hundredth of the rows."""
SMALL_ROWS = 15
CIRCUMSTANCES = {
    "reworded": ("other words", DEMO_TASKS),
    "shifted": ("pictures shifted", tuple(name for name in DEMO_TASKS if name in ILLUSTRATED)),
    "twopictures": ("a picture before", tuple(name for name in DEMO_TASKS if name in ILLUSTRATED)),
    "twoturns": ("a turn before", DEMO_TASKS),
}
"""Circumstances under which tasks are asked, and of which there are prompts."""
STRANGERS = "strangers"
LEARNED, ASKED = "robustness-rows", "robustness-prompts"


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns two runs: variants of what is learned, and variants of what is asked."""
    own = f"expert.steps={DEMO_STEPS}", f"evaluation.limit={PROMPTS}"
    others = [task(name) for name in DEMO_TASKS if name not in (VARIED, SMALL)]
    variants = [task(f"{VARIED}_{rows}", train=f"{VARIED}+many", on=VARIED, rows=rows) for rows in ROWS]
    variants += [task(f"{VARIED}_{noise}", train=f"{VARIED}+{noise}", on=VARIED) for noise in NOISE]
    variants += [task(VARIED), task(f"{SMALL}_{SMALL_ROWS}", train=SMALL, rows=SMALL_ROWS)]
    columns = [column(f"{name}_{how}", f"{name}+{how}") for how, (_, names) in CIRCUMSTANCES.items() for name in names]
    asked = stream([task(name) for name in DEMO_TASKS], [*columns, column(STRANGERS)])
    return [
        Run(LEARNED, seed, configure(LEARNED, seed, stream([*others, *variants]), *own), measure_learned),
        Run(ASKED, seed, configure(ASKED, seed, asked, *own), measure_asked),
    ]


def measure_learned(session: StreamSession, learned: LearnResult) -> Result:
    """Puts each variant into a pool with the other tasks, alone among its kind."""
    names = learned.pool.names
    variants = [name for name in names if name.startswith((f"{VARIED}_", f"{SMALL}_"))]
    others = [name for name in names if name not in (*variants, VARIED)]
    columns = [*names, *BENCHMARKS]
    base = session.evaluate(columns, None, BASE, who="the base").accuracies()
    result: Result = {}
    for variant in (*variants, VARIED):
        beside = others if variant != f"{SMALL}_{SMALL_ROWS}" else [*others, VARIED]
        pool = pools.part(learned.pool, [*beside, variant])
        on = [*pool.names, *BENCHMARKS]
        evaluation, alone = pools.routed(session, pool, on, variant), pools.oracle(session, pool, on)
        accuracy, given = evaluation.accuracies(), alone.accuracies()
        result[variant] = {
            "own": accuracy[variant],
            "oracle": given[variant],
            "routing": pools.share_to(evaluation, variant, variant),
            "others_kept": ratio(sum(accuracy[name] for name in beside), sum(given[name] for name in beside)),
            "base_kept": ratio(sum(accuracy[name] for name in BENCHMARKS), sum(base[name] for name in BENCHMARKS)),
        }
    return result


def measure_asked(session: StreamSession, learned: LearnResult) -> Result:
    """Asks the pool under each circumstance, and each task's expert alone."""
    tasks = learned.pool.names
    evaluation = session.evaluate(
        list(session.data.eval_tasks), learned.pool, learned.pool_digest, folder=learned.pool_folder, who="the pool"
    )
    accuracy = evaluation.accuracies()
    result: Result = {"plain": _asked(session, learned, {name: name for name in tasks}, evaluation, accuracy)}
    for how, (_, names) in CIRCUMSTANCES.items():
        columns = {name: f"{name}_{how}" for name in names if name in tasks}
        result[how] = _asked(session, learned, columns, evaluation, accuracy)
    result[STRANGERS] = {"routing": pools.share_to(evaluation, STRANGERS, BASE)}
    return result


def _asked(
    session: StreamSession,
    learned: LearnResult,
    columns: Mapping[str, str],
    evaluation: Any,
    accuracy: Mapping[str, float],
) -> Result:
    given = [pools.alone(session, learned.pool, name, [on]).accuracies()[on] for name, on in columns.items()]
    own = fmean(accuracy[on] for on in columns.values())
    return {
        "own": own,
        "oracle": fmean(given),
        "own_to_oracle": ratio(own, fmean(given)),
        "routing": fmean(pools.share_to(evaluation, on, name) for name, on in columns.items()),
    }


def summarise(results: Results) -> Figures:
    """Returns the figures by number of rows, noise, imbalance and circumstance."""

    def of(label: str, name: str, *keys: str) -> dict[str, float]:
        return of_results([result[name] for result in results[label]], *keys) if name in results[label][0] else {}

    keys = "own", "oracle", "routing", "others_kept", "base_kept"
    return {
        "rows": {str(rows): of(LEARNED, f"{VARIED}_{rows}", *keys) for rows in ROWS},
        "noise": {"none": of(LEARNED, VARIED, *keys)}
        | {noise: of(LEARNED, f"{VARIED}_{noise}", *keys) for noise in NOISE},
        "imbalance": of(LEARNED, f"{SMALL}_{SMALL_ROWS}", *keys),
        "asked": {
            how: of(ASKED, how, "own", "oracle", "own_to_oracle", "routing") for how in ("plain", *CIRCUMSTANCES)
        },
        STRANGERS: of(ASKED, STRANGERS, "routing"),
    }


def tables(figures: Figures) -> list[Table]:
    """Returns what was learned from, and under which circumstances it was asked."""
    learned = {f"{VARIED}, {int(rows):,} rows": part for rows, part in figures["rows"].items()}
    learned |= {
        f"{VARIED}, 1,500 rows" + (f", {NOISE[noise]:.0%} of the answers wrong" if noise in NOISE else ""): part
        for noise, part in figures["noise"].items()
    }
    learned[f"{SMALL}, {SMALL_ROWS} rows, beside {LARGE} with 1,500"] = figures["imbalance"]
    keys = "own", "oracle", "routing", "others_kept", "base_kept"
    asked = {"as learned": figures["asked"]["plain"]}
    asked |= {label: figures["asked"][how] for how, (label, _) in CIRCUMSTANCES.items()}
    rows = [
        [label, *(shown(part, key) for key in ("own", "oracle", "own_to_oracle", "routing"))]
        for label, part in asked.items()
    ]
    rows.append(["prompts of no task: to the base", "", "", "", shown(figures[STRANGERS], "routing")])
    return [
        Table(
            "What was learned from",
            ["learned from", "accuracy", "expert given", "routed right", "other tasks kept", "base abilities kept"],
            [[label, *(shown(part, key) for key in keys)] for label, part in learned.items()],
        ),
        Table("How it was asked", ["asked", "accuracy", "expert given", "of the expert's", "routed right"], rows),
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns accuracy by number of rows, and by circumstance."""

    def by_rows() -> Any:
        of_rows = [figures["rows"][str(rows)] for rows in ROWS]
        series = {
            "accuracy": pairs(of_rows, "own"),
            "expert given": pairs(of_rows, "oracle"),
            "routed right": pairs(of_rows, "routing"),
        }
        return lines(ROWS, series, "rows that the task was learned from")

    def by_circumstance() -> Any:
        parts = [figures["asked"][how] for how in ("plain", *CIRCUMSTANCES)]
        series = {
            "accuracy": pairs(parts, "own"),
            "expert given": pairs(parts, "oracle"),
            "routed right": pairs(parts, "routing"),
        }
        return bars(["as learned", *(label for label, _ in CIRCUMSTANCES.values())], series)

    return [
        Chart("rows", "Few rows and many", f"The task `{VARIED}` in a pool with four others.", by_rows),
        Chart("asked", "Other circumstances", "Means over the tasks of which there are such prompts.", by_circumstance),
    ]


EXPERIMENT = Experiment(
    version=1,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    notes=(
        f"{DEMO_STEPS} steps per task whatever its rows, {PROMPTS} prompts per task, ability and circumstance. Experts and "
        "router have never seen any of the circumstances.",
        "Shifted pictures have a colour cast, three quarters of the contrast and more noise. A picture before: the first of "
        "two pictures is a bar chart, to which the question cannot belong. A turn before: words were repeated first. Prompts "
        "of no task ask for what neither base nor tasks can do.",
    ),
)
