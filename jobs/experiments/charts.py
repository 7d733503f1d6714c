"""Figures of experiments: grouped bars and lines, each with its deviation over seeds where there is one."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.evaluation.plots import ABILITIES, CYCLE, INK, MUTED, plain_axes

WIDEST = 100
"""Characters of all labels below the bars together, in one line."""


def bars(groups: Sequence[str], series: Mapping[str, Sequence[tuple[float | None, float | None]]]) -> Figure:
    """Draws bars of fractions, a group per name; `series` gives (mean, deviation) per group, None where there is none."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * width
        places = [x + shift for x, (mean, _) in enumerate(values) if mean is not None]
        heights = [mean for mean, _ in values if mean is not None]
        errors = [math.nan if deviation is None else deviation for mean, deviation in values if mean is not None]
        known = not all(math.isnan(error) for error in errors)
        drawn = axes.bar(
            places, heights, 0.92 * width, yerr=errors if known else None, color=_colour(label, number),
            ecolor=MUTED, capsize=3, label=label,
        )  # fmt: skip
        if len(groups) * len(series) <= 26:
            axes.bar_label(drawn, [f"{height:.0%}" for height in heights], padding=3, fontsize=9, color=INK)
    wrap = partial(fill, width=max(8, WIDEST // len(groups)), break_long_words=False, break_on_hyphens=False)
    labels = ["\n".join(map(wrap, group.split("\n"))) for group in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=10)
    _fractions(axes)
    axes.set_xlim(-0.6, max(len(groups), 3) - 0.4)
    return figure


def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[tuple[float | None, float | None]]],
    label: str,
    *,
    lowest: float = 0.0,
    logarithmic: bool = True,
) -> Figure:
    """Draws fractions over x with a band of their deviation; `series` gives (mean, deviation) per x."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        known = [
            (place, mean, deviation or 0.0)
            for place, (mean, deviation) in zip(x, values, strict=True)
            if mean is not None
        ]
        if not known:
            continue
        places, means, deviations = (list(part) for part in zip(*known, strict=True))
        colour = _colour(name, number)
        axes.plot(places, means, color=colour, marker="o", linewidth=2, label=name)
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(list(x), [f"{place:,.6g}" for place in x], fontsize=11)
    axes.minorticks_off()
    axes.set_xlabel(label, color=MUTED, fontsize=11)
    _fractions(axes, lowest)
    return figure


def pairs(figures: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float | None, float | None]]:
    """Returns (mean, deviation) of a figure in each of these parts of a summary."""
    return [(part.get(f"{name}_mean"), part.get(f"{name}_std")) for part in figures]


def _colour(label: str, number: int) -> str:
    """Returns the colour of a series; that of the base abilities is the report's."""
    return ABILITIES if label.startswith("base abilities") else CYCLE[number % len(CYCLE)]


def _fractions(axes: Any, lowest: float = 0.0) -> None:
    axes.set_ylim(lowest, 1.0 + 0.12 * (1 - lowest))
    axes.set_yticks([lowest + part * (1 - lowest) for part in (0, 0.25, 0.5, 0.75, 1)])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain_axes(axes, "accuracy")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, frameon=False, fontsize=11)
