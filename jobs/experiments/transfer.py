"""Transfer between modalities: an operation is learned on text alone, or on pictures alone, and asked for on the other."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from jobs.experiments import pools
from jobs.experiments.charts import bars, pairs
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table, Target
from jobs.experiments.seeds import over_seeds, ratio, shown
from jobs.experiments.settings import column, stream, task
from pipeline.evaluation.plots import METHODS
from pipeline.learning.baselines import ROUTERS, compare_methods
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession
from pipeline.models.tiny import OPERATIONS_BASE

STEPS = 150
"""Optimizer steps per task."""
PROMPTS = 60
"""Prompts per task and ability."""
OPERATIONS = ("next", "rotate", "only_odd")
"""Tasks that there are on written and on printed sequences, and that the base has not learned."""
TEXT, PICTURES = "transfer-text", "transfer-pictures"
"""Runs, by the modality that is learned."""
NAMES = {TEXT: "{}_text", PICTURES: "{}_picture"}
"""Names of an operation's task and data, by the modality that it is learned in."""
OTHER = {TEXT: PICTURES, PICTURES: TEXT}
WORDS = {TEXT: "text", PICTURES: "pictures"}


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns a run per modality: it learns all operations in one and is asked for them in both."""
    own = f"base.path={OPERATIONS_BASE}", f"expert.steps={STEPS}", f"evaluation.limit={PROMPTS}"
    made = []
    for label, other in OTHER.items():
        tasks = [task(NAMES[label].format(name)) for name in OPERATIONS]
        unseen = [column(NAMES[other].format(name)) for name in OPERATIONS]
        made.append(Run(label, seed, configure(label, seed, stream(tasks, unseen), *own), measure))
    return made


def measure(session: StreamSession, learned: LearnResult) -> Result:
    """Returns the accuracy of every method on the modality that was learned and on the other one, by operation."""
    label = TEXT if learned.pool.names == [NAMES[TEXT].format(name) for name in OPERATIONS] else PICTURES
    methods = compare_methods(session, learned, routers=tuple(ROUTERS))
    result: Result = {}
    for operation in OPERATIONS:
        seen, unseen = NAMES[label].format(operation), NAMES[OTHER[label]].format(operation)
        given = pools.alone(session, learned.pool, seen, [unseen]).accuracies()[unseen]
        by_method = {name: method["columns"] for name, method in methods.items()}
        result[operation] = {
            "seen": {name: columns[seen] for name, columns in by_method.items()},
            "unseen": {name: columns[unseen] for name, columns in by_method.items()} | {"oracle": given},
        }
    abilities = {name: method["base_abilities"] for name, method in methods.items()}
    return result | {"base_abilities": without_unseen(session, learned, abilities, methods)}


def without_unseen(
    session: StreamSession, learned: LearnResult, abilities: Mapping[str, Any], methods: Mapping[str, Any]
) -> dict[str, float]:
    """Returns base abilities by method: of the benchmarks, those that are no operation in the other modality."""
    unseen = {pattern.format(name) for pattern in NAMES.values() for name in OPERATIONS}
    names = [each.name for each in session.config.stream.benchmarks if each.name not in unseen]
    return {method: fmean(methods[method]["columns"][name] for name in names) for method in abilities}


def summarise(results: Results) -> Figures:
    """Returns accuracies by pair (operation, from one modality to the other) and method, and the best ratio of the default.

    The ratio is that of the default router's accuracy on the unseen modality to that of an expert that was trained on it.
    """
    figures: Figures = {"pairs": {}}
    for label, other in OTHER.items():
        for operation in OPERATIONS:
            here = [result[operation] for result in results[label]]
            there = [result[operation]["seen"]["oracle"] for result in results[other]]
            methods = list(here[0]["unseen"])
            part: Figures = {
                method: over_seeds({"unseen": [of["unseen"][method] for of in here]}) for method in methods
            }
            for method in methods:
                part[method] |= over_seeds({"seen": [of["seen"][method] for of in here]})
            part["trained_on_it"] = over_seeds({"unseen": there})
            part |= over_seeds(
                {"ratio": [ratio(of["unseen"]["prompt"], bound) for of, bound in zip(here, there, strict=True)]}
            )
            part |= over_seeds(
                {"base_ratio": [ratio(of["unseen"]["base"], bound) for of, bound in zip(here, there, strict=True)]}
            )
            figures["pairs"][f"{operation}_{WORDS[label]}_to_{WORDS[other]}"] = part
    ratios = {name: part["ratio_mean"] for name, part in figures["pairs"].items() if "ratio_mean" in part}
    if ratios:
        best = max(ratios, key=ratios.__getitem__)
        figures |= {"best_ratio": ratios[best], "best_pair": best}
        figures["best_ratio_of_base"] = figures["pairs"][best]["base_ratio_mean"]
    abilities = [result["base_abilities"] for label in OTHER for result in results[label]]
    figures["base_abilities"] = {
        method: over_seeds({"base_abilities": [of[method] for of in abilities]}) for method in abilities[0]
    }
    return figures


def _methods(figures: Figures) -> list[str]:
    some = next(iter(figures["pairs"].values()))
    return [name for name in METHODS if name in some]


def tables(figures: Figures) -> list[Table]:
    """Returns accuracies on the unseen modality, and on the learned one."""
    names, labels = list(figures["pairs"]), {name: METHODS[name].replace("\n", " ") for name in _methods(figures)}
    labels["oracle"] = "that task's expert, given"
    header = ["method", *(name.replace("_", " ") for name in names), "base abilities"]
    ours = frozenset(i for i, name in enumerate(labels) if name == "prompt")

    def rows(key: str) -> list[list[str]]:
        return [
            [
                label,
                *(shown(figures["pairs"][name][method], key) for name in names),
                shown(figures["base_abilities"][method], "base_abilities"),
            ]
            for method, label in labels.items()
        ]

    bound = [
        "an expert trained on it",
        *(shown(figures["pairs"][name]["trained_on_it"], "unseen") for name in names),
        "",
    ]
    reached = (
        f"Best for the default router: {figures['best_pair'].replace('_', ' ')}, {figures['best_ratio']:.2f} of what an expert "
        f"reaches that was trained on it; the base without any expert reaches {figures['best_ratio_of_base']:.2f} there."
        if "best_ratio" in figures
        else "No expert learned anything in the other modality to compare with."
    )
    return [
        Table("Accuracy on the modality that was not learned", header, [*rows("unseen"), bound], reached, ours),
        Table("Accuracy on the modality that was learned", header, rows("seen"), ours=ours),
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns accuracy on the unseen modality by pair and method."""
    names = list(figures["pairs"])

    def draw() -> Any:
        shown_methods = ("base", "oracle", "sequential", "multitask", "prompt", "two_level", "trained_on_it")
        words = {
            "oracle": "expert given",
            "trained_on_it": "trained on it",
            "two_level": "two-level router",
            "prompt": "prompt router",
        }
        series = {
            words.get(method, method): pairs([figures["pairs"][name][method] for name in names], "unseen")
            for method in shown_methods
            if all(method in figures["pairs"][name] for name in names)
        }
        return bars(
            [name.replace("_", " ") for name in names],
            series,
        )

    caption = (
        "Accuracy on the modality in which the operation was not learned, beside an expert that has learned it there."
    )
    return [Chart("transfer", "From one modality to the other", caption, draw)]


EXPERIMENT = Experiment(
    version=2,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    targets=(Target("best_ratio", ">=", 0.5),),
    notes=(
        f"Operations on sequences ({', '.join(OPERATIONS)}) that the base does not know, learned in one modality only, {STEPS} "
        "steps each, and asked for in the other: the same question, its sequence written or printed. "
        f"{PROMPTS} held-out prompts.",
        "The base is `pipeline/models/operations_base`, which has learned twelve other operations in both modalities.",
        "A method transfers where it beats the base on the unseen modality; the expert given shows what its weights can do "
        "there, whatever the router does.",
    ),
)
