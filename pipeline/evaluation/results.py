"""Results of an evaluation: predictions and scores, and per task its accuracy and who answered.

Independent of how answers are generated; a run stores `to_json`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from pipeline.data.rows.records import Reference
from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Prediction:
    """One answered prompt."""

    task: str
    """Its task or benchmark."""
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
    """With routing: the likeliest candidates with posterior and distance."""
    group: str = ""
    """Predictions of a task with the same group are one question; empty: a question of its own."""


def scored(
    task: str, metric: str, id: str, question: str, reference: str, prediction: str, expert: str, why: str = ""
) -> Prediction:
    """Scores a prediction by its task's metric; `reference` is a Reference as JSON."""
    accepted = Reference.model_validate_json(reference)
    value = METRICS[metric](prediction, accepted)
    return Prediction(task, id, question, accepted.answers[0], prediction, value, expert, why, accepted.group)


@dataclass(frozen=True)
class Stray:
    """A prompt that was not routed to its task's expert (of a base ability: not to the base)."""

    id: str
    question: str
    expert: str
    """Who answered: an expert, or `base`."""


@dataclass(frozen=True)
class TaskResult:
    """Result on one task or benchmark."""

    accuracy: float
    """Mean over questions of the lowest score among their predictions (see `of`)."""
    row_accuracy: float | None
    """Mean score over the predictions, where questions are groups."""
    experts: Mapping[str, int]
    """Prompts by the expert that answered them, or `base`."""
    samples: tuple[Prediction, ...] = ()
    """The first predictions."""
    strays: tuple[Stray, ...] = ()
    """With routing: the prompts that went elsewhere than they should."""
    calibration: Calibration | None = None
    """With one decision per prompt: how sure the router was, and how often it was right."""

    @classmethod
    def of(cls, predictions: Sequence[Prediction], samples: int = 0, *, own: str | None = None) -> "TaskResult":
        """Aggregates a task's predictions, and keeps the first `samples` of them; `own` is who should have answered.

            A = 1/|Q| · Σ_{q in Q} min_{p in q} score(p)

        Q: the groups of predictions; a prediction without a group is its own question, so without groups A is the mean
        score. With one group per multiple-choice question's rotations this is CircularEval: right only if all are. Source:
        Liu et al. 2023 (MMBench), arXiv 2307.06281. The mean over the predictions is then the accuracy of single rotations
        (MMBench's VanillaEval asks only the first).
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
            strays=tuple(Stray(p.id, p.question, p.expert) for p in predictions if own not in (None, p.expert)),
        )


@dataclass(frozen=True)
class Evaluation:
    """Results by task or benchmark."""

    results: Mapping[str, TaskResult]

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> "Evaluation":
        """Aggregates predictions by task, and keeps them all."""
        by_task: dict[str, list[Prediction]] = {}
        for prediction in predictions:
            by_task.setdefault(prediction.task, []).append(prediction)
        return cls({task: TaskResult.of(predictions, len(predictions)) for task, predictions in by_task.items()})

    @property
    def samples(self) -> list[Prediction]:
        """The predictions that were kept."""
        return [prediction for result in self.results.values() for prediction in result.samples]

    def accuracies(self) -> dict[str, float]:
        """Returns the accuracy per task."""
        return {task: result.accuracy for task, result in self.results.items()}

    def row_accuracies(self) -> dict[str, float]:
        """Returns the mean score over the predictions, per task with groups."""
        return {c: result.row_accuracy for c, result in self.results.items() if result.row_accuracy is not None}

    def routing_accuracy(self, tasks: Sequence[str]) -> float:
        """Returns the share of prompts routed correctly: a task's to its expert, others to the base."""
        right = sum(result.experts.get(c if c in tasks else BASE, 0) for c, result in self.results.items())
        return right / sum(count for result in self.results.values() for count in result.experts.values())

    def calibration(self, tasks: Sequence[str]) -> dict[str, Any] | None:
        """Returns how well the router's posteriors are calibrated, and the prompts on the wrong side of the base.

        None where the prompts are not decided by posteriors. False accepts: base prompts that went to an expert; false rejects:
        prompts of tasks that went to the base; both as shares.
        """
        known = {name: result for name, result in self.results.items() if result.calibration is not None}
        if not known:
            return None
        all_of_it = Calibration.sum(result.calibration for result in known.values() if result.calibration is not None)
        rows = {}
        for name, result in known.items():
            prompts, to_base = sum(result.experts.values()), result.experts.get(BASE, 0)
            assert result.calibration is not None
            rows[name] = {
                "prompts": prompts,
                "error": result.calibration.error,
                "false_rejects": to_base / prompts if name in tasks else None,
                "false_accepts": None if name in tasks else 1 - to_base / prompts,
            }
        return {
            "error": all_of_it.error,
            **{side: _mean_share(rows.values(), side) for side in ("false_accepts", "false_rejects")},
            "bins": all_of_it.to_json(),
            "columns": rows,
        }

    def shares(self, experts: Sequence[str], tasks: Sequence[str]) -> list[list[float]]:
        """Returns the share of each task's prompts per expert (experts x tasks)."""
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
            strays = tuple(Stray(**stray) for stray in result.get("strays", ()))
            calibration = None if (plain := result.get("calibration")) is None else Calibration.from_json(plain)
            read = {"samples": samples, "strays": strays, "calibration": calibration}
            results[name] = TaskResult(**(result | read))
        return cls(results)


def _mean_share(rows: Iterable[Mapping[str, Any]], side: str) -> float | None:
    """Returns the share over the prompts of all rows that have one; None where none has."""
    shares = [(row[side], row["prompts"]) for row in rows if row[side] is not None]
    return sum(share * prompts for share, prompts in shares) / sum(n for _, n in shares) if shares else None
