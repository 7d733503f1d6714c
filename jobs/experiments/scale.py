"""A growing number of tasks: a hundred that are easily confused, and the pool as it was after 5, 10, 20, 50 and 100 of them."""

import math
from statistics import median
from typing import Any

from jobs.experiments import pools
from jobs.experiments.charts import lines, pairs
from jobs.experiments.confusables import OWN, PROMPTS, STEPS, mean, routing_accuracy
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table, Target
from jobs.experiments.seeds import of_results, over_seeds, ratio, shown
from jobs.experiments.settings import stream, task
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.data.demo.confusable import KINDS, REPORTED, TUNED, mixed
from pipeline.evaluation.matrix import BASE, AccuracyMatrix
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession

SIZES = (5, 10, 20, 50, 100)
"""Tasks in a pool."""
ASKED = 25
"""Prompts per task."""
LAST = 5
"""Tasks before each size whose median of seconds is given."""
KEYS = ("own", "oracle", "own_to_oracle", "base_kept", "routing", "base_routing", "seconds_per_task")


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns one run: the hundred tasks."""
    config = configure("scale", seed, stream([task(name, prompts=ASKED) for name in mixed(max(SIZES))]), *OWN)
    return [Run("scale", seed, config, measure)]


def measure(session: StreamSession, learned: LearnResult) -> Result:
    """Reads the pool of the first n tasks off the learned one, for each n; nothing is trained for it."""
    matrix = AccuracyMatrix.from_json(learned.summary["accuracy_matrix"])
    names = matrix.tasks
    seconds = [learned.summary["tasks"][name].get("turn_seconds") for name in names]
    alone = pools.oracle(session, learned.pool, [*names, *BENCHMARKS]).accuracies()
    base = mean({name: matrix.value(BASE, name) or 0.0 for name in BENCHMARKS}, BENCHMARKS)
    result: Result = {}
    for size in SIZES:
        tasks = names[:size]
        if len(tasks) < size:  # of a stream that was cut short
            continue
        evaluation = pools.routed(session, pools.part(learned.pool, tasks), [*tasks, *BENCHMARKS], f"{size} experts")
        accuracy = evaluation.accuracies()
        known = [of for of in seconds[max(0, size - LAST) : size] if of is not None]
        result[str(size)] = {
            "own": mean(accuracy, tasks),
            "oracle": mean(alone, tasks),
            "own_to_oracle": ratio(mean(accuracy, tasks), mean(alone, tasks)),
            "base_kept": ratio(mean(accuracy, BENCHMARKS), base),
            "routing": routing_accuracy(evaluation, tasks, tasks),
            "base_routing": routing_accuracy(evaluation, tasks, BENCHMARKS),
            "seconds_per_task": median(known) if known else None,
            "kinds": {
                kind: routing_accuracy(evaluation, tasks, of)
                for kind in KINDS
                if (of := [name for name in tasks if name.startswith(kind)])
            },
        }
    return result


def summarise(results: Results) -> Figures:
    """Returns the figures by number of tasks; `own_to_oracle` and `base_kept` also plain, as means."""
    by_seed = results["scale"]
    figures: Figures = {}
    for size in map(str, SIZES):
        if size not in by_seed[0]:
            continue
        of_size = [result[size] for result in by_seed]
        figures[size] = of_results(of_size, *KEYS)
        figures[size] |= {
            key: figures[size][f"{key}_mean"]
            for key in ("own_to_oracle", "base_kept")
            if f"{key}_mean" in figures[size]
        }
        figures[size]["kinds"] = {
            kind: over_seeds({"routing": [result["kinds"].get(kind) for result in of_size]}) for kind in KINDS
        }
    return figures


def tables(figures: Figures) -> list[Table]:
    """Returns the pool at each size, and routing by stream."""
    sizes = [size for size in map(str, SIZES) if size in figures]
    header = [
        "tasks",
        "new tasks",
        "oracle",
        "of oracle",
        "base abilities kept",
        "routed right: tasks",
        "base",
        "seconds per task",
    ]
    rows = [
        [
            size,
            *(shown(figures[size], key) for key in KEYS[:-1]),
            f"{figures[size]['seconds_per_task_mean']:.1f}" if "seconds_per_task_mean" in figures[size] else "—",
        ]
        for size in sizes
    ]
    by_kind = [[size, *(shown(figures[size]["kinds"][kind], "routing") for kind in KINDS)] for size in sizes]
    note = f"Choices may be made on the stream `{TUNED}`; figures that count are of {', '.join(REPORTED)}."
    return [
        Table("The pool as it grows", header, rows),
        Table("Prompts of tasks routed right, by stream", ["tasks", *KINDS], by_kind, note),
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns accuracy, routing and base abilities by number of tasks."""
    sizes = [size for size in SIZES if str(size) in figures]
    of_sizes = [figures[str(size)] for size in sizes]

    def draw() -> Any:
        series = {
            "new tasks, of oracle": pairs(of_sizes, "own_to_oracle"),
            "routed right": pairs(of_sizes, "routing"),
            "base abilities kept": pairs(of_sizes, "base_kept"),
        }
        least = min(mean for values in series.values() for mean, _ in values if mean is not None)
        # Shares near one are told apart from a tenth, or two, below them.
        return lines(sizes, series, "tasks in the pool", lowest=max(0.0, math.floor(10 * least - 0.5) / 10))

    caption = (
        "Shares of what oracle routing reaches, of prompts, and of what the base reaches; bands: deviations over seeds."
    )
    return [Chart("scale", "As the pool grows", caption, draw)]


EXPERIMENT = Experiment(
    version=1,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    targets=(Target("100.own_to_oracle", ">=", 0.99), Target("100.base_kept", ">=", 0.995)),
    notes=(
        f"Tasks of the four confusable streams in turn, {STEPS} steps of 16 rows each, {ASKED} held-out prompts per task, "
        f"{PROMPTS} per ability. Each task translates what it is asked for by a secret dictionary, so a prompt gone astray "
        "is answered wrong. The pools of 5, 10, 20 and 50 tasks are the first experts of the pool of 100.",
        "Seconds per task are the median of the last five before that size, start-up, registry and evaluation included, of "
        "tasks that this run has trained.",
    ),
)
