"""What an evaluation found: predictions and their scores, of each column its accuracy and who answered.

Knows nothing of how answers come about; `to_json` is what a run keeps of an evaluation.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.data.rows.records import Reference
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Prediction:
    """One answered prompt."""

    task: str
    """Task or base ability it belongs to."""
    id: str
    question: str
    answer: str
    """First accepted answer."""
    prediction: str
    score: float
    """By the task's metric, 0 to 1."""
    expert: str
    """Expert with the largest weight, or `base`."""
    why: str = ""
    """Where a router chose: the likeliest candidates with their figures."""
    group: str = ""
    """Predictions of one group in a column are one question; empty: a question of its own."""


def scored(
    task: str, metric: str, id: str, question: str, reference: str, prediction: str, expert: str, why: str = ""
) -> Prediction:
    """Scores a prediction by its task's metric; `reference` is a Reference as JSON."""
    accepted = Reference.model_validate_json(reference)
    value = METRICS[metric](prediction, accepted)
    return Prediction(task, id, question, accepted.answers[0], prediction, value, expert, why, accepted.group)


@dataclass(frozen=True)
class TaskResult:
    """What was found on one column."""

    accuracy: float
    """Mean over the column's questions of the worst of their predictions' scores (see `of`)."""
    row_accuracy: float | None
    """Where questions are groups: the mean score over the predictions."""
    experts: Mapping[str, int]
    """Prompts by the expert that answered them, or `base`."""
    samples: tuple[Prediction, ...] = ()
    """The first predictions."""

    @classmethod
    def of(cls, predictions: Sequence[Prediction], samples: int = 0) -> "TaskResult":
        """Sums a column's predictions up, and keeps the first `samples` of them.

            A = 1/|Q| · Σ_{q in Q} min_{p in q} score(p)

        Q: the predictions, divided into their groups; one without a group is a question of its own, so that without groups
        A is the mean score. With one group for the rotations of a multiple-choice question this is CircularEval: right only
        if all are. Source: Liu et al. 2023 (MMBench), arXiv 2307.06281. The mean over the predictions is then what asking
        each rotation alone would have shown (MMBench's VanillaEval asks only the first).
        """
        worst: dict[str | int, float] = {}
        for number, p in enumerate(predictions):
            question = p.group or number
            worst[question] = min(p.score, worst.get(question, p.score))
        grouped = any(p.group for p in predictions)
        return cls(
            accuracy=fmean(worst.values()),
            row_accuracy=fmean(p.score for p in predictions) if grouped else None,
            experts=dict(Counter(p.expert for p in predictions)),
            samples=tuple(predictions[:samples]),
        )


@dataclass(frozen=True)
class Evaluation:
    """What was found on every column."""

    results: Mapping[str, TaskResult]

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> "Evaluation":
        """Sums predictions up, column by column, and keeps them all."""
        by_task: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            by_task.setdefault(prediction.task, []).append(prediction)
        return cls({task: TaskResult.of(predictions, len(predictions)) for task, predictions in by_task.items()})

    @property
    def samples(self) -> list[Prediction]:
        """The predictions that were kept."""
        return [prediction for result in self.results.values() for prediction in result.samples]

    def accuracies(self) -> dict[str, float]:
        """Returns the accuracy of every column."""
        return {task: result.accuracy for task, result in self.results.items()}

    def row_accuracies(self) -> dict[str, float]:
        """Returns the mean score over the predictions, groups or not, of every column that has groups."""
        return {c: result.row_accuracy for c, result in self.results.items() if result.row_accuracy is not None}

    def routing_accuracy(self, tasks: Sequence[str]) -> float:
        """Returns the share of prompts answered by the right one: a task's by its expert, others by the base."""
        right = sum(result.experts.get(c if c in tasks else BASE, 0) for c, result in self.results.items())
        return right / sum(count for result in self.results.values() for count in result.experts.values())

    def shares(self, experts: Sequence[str], tasks: Sequence[str]) -> list[list[float]]:
        """Returns the share of each column's prompts that went to each expert (experts x columns)."""
        counts = np.array([[self.results[task].experts.get(expert, 0) for task in tasks] for expert in experts])
        return (counts / np.maximum(counts.sum(0), 1)).tolist()

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form, in which a prediction's task is called `column`."""
        plain = {name: asdict(result) for name, result in self.results.items()}
        for result in plain.values():
            result["samples"] = tuple({"column": sample.pop("task"), **sample} for sample in result["samples"])
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Evaluation":
        """Reads what `to_json` wrote. Raises TypeError or KeyError where it is something else."""
        results = {}
        for name, result in plain.items():
            samples = tuple(
                Prediction(**{"task" if key == "column" else key: value for key, value in sample.items()})
                for sample in result["samples"]
            )
            results[name] = TaskResult(**(result | {"samples": samples}))
        return cls(results)
