"""What a sweep has found: trials with their points and metrics, the best of them, and the summary for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from tuning.objective import HELD_OUT, Objective, pareto_front
from tuning.space import Point

SHOWN = ("objective", "accuracy", HELD_OUT, "others", "abilities", "cost")
"""Metrics that tables show, in this order."""

WORDS = {
    "objective": "objective",
    "accuracy": "task",
    HELD_OUT: "held out",
    "others": "other tasks",
    "abilities": "base abilities",
    "cost": "M parameters",
}
"""What they are called there."""


@dataclass(frozen=True)
class Trial:
    """One point that was tried."""

    number: int
    """In the order in which Tune drew them, from 1."""
    point: Point
    """Its values, without fields that do not apply."""
    values: Mapping[str, Any]
    """The values in force of all fields of the space."""
    status: Literal["done", "stopped", "failed"]
    """`stopped` early, by the scheduler: it was not evaluated."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def name(self) -> str:
        """Its values, short."""
        return " ".join(f"{name.rpartition('.')[2]}={shown(value)}" for name, value in self.point.items())

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return {"number": self.number, "status": self.status, "point": self.point, "values": dict(self.values)} | {
            "metrics": dict(self.metrics),
            "error": self.error,
        }


@dataclass(frozen=True)
class SweepResult:
    """A sweep that is over."""

    trials: Sequence[Trial]
    """The best first; then those that were stopped, then those that failed."""
    objective: Objective
    seconds_total: float
    training_seconds: Mapping[str, float]
    """Wall time of the trainings of this call, by expert."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Losses by step of the trainings of this call, by expert."""

    @property
    def done(self) -> list[Trial]:
        """The trials that were evaluated, the best first."""
        return [trial for trial in self.trials if trial.status == "done"]

    @property
    def best(self) -> Trial | None:
        """The winner; None where no trial was evaluated."""
        return next(iter(self.done), None)

    @property
    def pareto(self) -> list[int]:
        """Numbers of the trials that no other one beats."""
        done = self.done
        return sorted(done[i].number for i in pareto_front([trial.metrics for trial in done]))

    @property
    def seconds_one_training(self) -> float | None:
        """Mean time of both stages of the trainings of this call; None where nothing was trained to its end.

        Wall time would hold the start of workers, and the wait for their base, wherever they were not yet warm.
        """
        stages = {trial.metrics["expert"]: trial.metrics["training_seconds"] for trial in self.done}
        seconds = [stages[expert] for expert in self.training_seconds if expert in stages]
        return fmean(seconds) if seconds else None

    def summary(self) -> dict[str, Any]:
        """Returns the sweep's part of `summary.json`."""
        best = self.best
        return {
            "sweep": {
                "seconds_total": self.seconds_total,
                "seconds_one_training": self.seconds_one_training,
                "trainings": len(self.training_seconds),
                "trials": len(self.trials),
                "stopped": sum(trial.status == "stopped" for trial in self.trials),
                "failed": sum(trial.status == "failed" for trial in self.trials),
            },
            "objective": {"text": self.objective.text, "weights": dict(self.objective.weights)},
            "best": None if best is None else best.number,
            "pareto": self.pareto,
            "training_seconds": dict(self.training_seconds),
            "trials": [trial.to_json() for trial in self.trials],
        }


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Returns trials by objective, of equal ones the cheaper first; then those that were stopped, then those that failed."""
    order = {"done": 0, "stopped": 1, "failed": 2}

    def key(trial: Trial) -> tuple[Any, ...]:
        metrics = trial.metrics
        return order[trial.status], -round(metrics.get("objective", 0.0), 9), metrics.get("cost", 0.0), trial.number

    return sorted(trials, key=key)


LONGEST = 24
"""Characters of a text that are shown; a longer one keeps its ends."""


def shown(value: Any) -> str:
    """Writes a value short."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 2]}…{text[1 - LONGEST // 2 :]}"
