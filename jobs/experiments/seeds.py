"""Figures over seeds: each as mean `<name>_mean` and standard deviation `<name>_std`."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from pipeline.evaluation.report import percent, spread


def over_seeds(values: Mapping[str, Iterable[float | None]]) -> dict[str, float]:
    """Returns mean and sample standard deviation of each figure, by name; of one seed the deviation is left out.

    A figure that was not measured with some seed is left out: its mean would be that of other seeds.
    """
    figures = {}
    for name, by_seed in values.items():
        measured = list(by_seed)
        present = [value for value in measured if value is not None]
        if not present or len(present) < len(measured):
            continue
        figures[f"{name}_mean"] = fmean(present)
        if len(present) > 1:
            figures[f"{name}_std"] = stdev(present)
    return figures


def of_results(results: Sequence[Mapping[str, Any]], *names: str) -> dict[str, float]:
    """Returns `over_seeds` of figures that results hold under these names."""
    return over_seeds({name: [result.get(name) for result in results] for name in names})


def shown(figures: Mapping[str, Any], name: str) -> str:
    """Writes a figure as a percentage with its deviation; a dash where there is none."""
    return percent(figures.get(f"{name}_mean")) + spread(figures.get(f"{name}_std"))


def ratio(value: float | None, of: float | None) -> float | None:
    """Returns a ratio; None where there is nothing to divide."""
    return value / of if value is not None and of else None
