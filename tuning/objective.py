"""What a sweep looks for: weights of what a trial measures, or all trials that no other one beats (Pareto).

    objective = sum_i w_i m_i / sum_i |w_i|       m_i: the trial's metrics; those that the pool has not are left out

- `accuracy`   on the swept task, routed by the pool: on its held-out rows where the task has `validation`, else on its
               evaluation rows, which then no longer tell how good the winner is on new data
- `others`     mean accuracy on the pool's other tasks
- `abilities`  mean accuracy on the base abilities
- `cost`       millions of LoRA parameters: memory and computation that the expert adds for good; give it a negative weight

Independent of Ray.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import ConfigError

METRICS = ("accuracy", "others", "abilities", "cost")
"""What an objective may weigh."""

HELD_OUT = "held_out"
"""Accuracy on held-out rows, which takes the place of `accuracy`."""

SELECTION = "selection"
"""Key of the accuracy that an objective takes, whichever it is."""

PARETO = "pareto"

DEFAULT = "accuracy=1,others=1,abilities=1"
"""A better expert that takes prompts from others, or from the base, is none."""


@dataclass(frozen=True)
class Objective:
    """Weights by metric; those of `pareto` choose among its trials."""

    weights: Mapping[str, float]
    pareto: bool = False

    @classmethod
    def read(cls, text: str) -> "Objective":
        """Reads `metric=weight,...` or `pareto`; raises ConfigError."""
        if text.strip() == PARETO:
            return cls(cls.read(DEFAULT).weights, pareto=True)
        weights: dict[str, float] = {}
        for part in text.split(","):
            name, separator, weight = (word.strip() for word in part.partition("="))
            if name not in METRICS:
                raise ConfigError(
                    f"--objective {text}: no metric {name!r}; there are {', '.join(METRICS)}, each with a weight, "
                    f"e.g. {DEFAULT}; or {PARETO}"
                )
            if name in weights:
                raise ConfigError(f"--objective {text}: {name} is there twice")
            try:
                weights[name] = float(weight) if separator else 1.0
            except ValueError:
                raise ConfigError(f"--objective {text}: {weight!r} is no number") from None
            if not math.isfinite(weights[name]):
                raise ConfigError(f"--objective {text}: {weight!r} is no weight")
        if not any(weights.values()):
            raise ConfigError(f"--objective {text}: all weights are 0")
        return cls(weights)

    @property
    def text(self) -> str:
        """As `read` reads it."""
        return PARETO if self.pareto else ",".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def check(self, measured: Sequence[str]) -> None:
        """Raises ConfigError where trials, which have the metrics `measured`, would all be equal."""
        if not any(weight and name in measured for name, weight in self.weights.items()):
            raise ConfigError(
                f"--objective {self.text}: trials have none of it: without a learned pool there are no other tasks, without "
                f"stream.benchmarks no abilities; weigh some of {', '.join(measured)}"
            )

    def of(self, metrics: Mapping[str, Any]) -> float:
        """Returns the objective of a trial."""
        there = {n: w for n, w in self.weights.items() if value(metrics, n) is not None}
        total = sum(abs(weight) for weight in there.values())
        return sum(w * (value(metrics, n) or 0.0) for n, w in there.items()) / total if total else 0.0

    def optimized(self, measured: Sequence[str]) -> tuple[Any, Any]:
        """Returns what Tune's searchers optimize, and in which direction; `measured` are the metrics that trials have."""
        if not self.pareto:
            return "objective", "max"
        names = [SELECTION if name == "accuracy" else name for name in METRICS if name in measured]
        return names, ["min" if name == "cost" else "max" for name in names]


def value(metrics: Mapping[str, Any], name: str) -> float | None:
    """Returns a metric that an objective weighs."""
    if name == "accuracy" and metrics.get(HELD_OUT) is not None:
        return float(metrics[HELD_OUT])
    found = metrics.get(name)
    return None if found is None else float(found)


def pareto_front(trials: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the indices of the trials that no other one beats: at least as good in all metrics, and better in one."""
    signs = {name: -1.0 if name == "cost" else 1.0 for name in METRICS}
    points = [[sign * (value(t, name) or 0.0) for name, sign in signs.items()] for t in trials]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(one, other, strict=True)) and any(
            a > b for a, b in zip(one, other, strict=True)
        )

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
