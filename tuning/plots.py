"""The plots of a sweep's report, each a function from its summary to a matplotlib Figure.

In the colours of `pipeline.evaluation.plots`. `PLOTS` lists them in the report's order; those whose data a sweep lacks are left
out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from pipeline.evaluation.plots import ABILITIES, CYCLE, HEAT, INK, LINE, MUTED, TASKS, plain_axes
from tuning.objective import HELD_OUT
from tuning.results import SHOWN, WORDS, shown

COLUMNS = 3
"""Panels in a row."""

WRAPPED = 14
"""Characters of a line where names stand side by side."""

BEHIND = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
"""What keeps lines off a label."""


def parallel_coordinates(summary: Mapping[str, Any]) -> Figure:
    """A line per evaluated trial through its values and metrics; the darker the better, the best in orange."""
    trials = _done(summary)
    fields = [name for name in trials[0]["values"] if len({repr(t["values"][name]) for t in trials}) > 1]
    metrics = [
        name for name in SHOWN if name != "objective" and all(t["metrics"].get(name) is not None for t in trials)
    ]
    metrics.append("objective")
    scales = [_Scale([t["values"][name] for t in trials]) for name in fields]
    scales += [_Scale([t["metrics"][name] for t in trials]) for name in metrics]
    names = [_short(name) for name in fields] + [WORDS[name] for name in metrics]
    figure = Figure(figsize=(max(12, 1.5 * len(names)), 5.4), layout="constrained")
    axes = figure.subplots()
    low, high = _ends([t["metrics"]["objective"] for t in trials])
    for trial in reversed(trials):  # the best on top
        values = [*(trial["values"][name] for name in fields), *(trial["metrics"][name] for name in metrics)]
        height = [scale.place(value) for scale, value in zip(scales, values, strict=True)]
        best = trial["number"] == summary["best"]
        shade = 0.25 + 0.75 * (trial["metrics"]["objective"] - low) / (high - low)
        axes.plot(height, color=ABILITIES if best else HEAT(shade), linewidth=2.6 if best else 1.2, alpha=0.9)
    for x, scale in enumerate(scales):
        axes.axvline(x, color=LINE, linewidth=1, zorder=0)
        for place, label in scale.ticks():
            axes.text(x + 0.03, place, fill(label, WRAPPED), fontsize=9.5, color=INK, va="center", bbox=BEHIND)
    axes.set_xticks(range(len(names)), [fill(name, WRAPPED, break_long_words=False) for name in names], fontsize=11)
    axes.set_xlim(-0.1, len(names) - 0.7)
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_locator(NullLocator())
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    return figure


def by_field(summary: Mapping[str, Any]) -> Figure:
    """A panel per field with several values: objective of every trial that tries it, and the mean of each value of a list."""
    trials = _done(summary)
    fields = [name for name in trials[0]["values"] if _differs(summary, name)]
    rows = -(-len(fields) // COLUMNS)
    figure = Figure(figsize=(12, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, name in zip(panels, fields, strict=False):
        points = [(t["values"][name], t["metrics"]["objective"]) for t in trials if name in t["point"]]
        at = _axis(axes, [value for value, _ in points])
        axes.scatter([at(value) for value, _ in points], [y for _, y in points], color=TASKS, alpha=0.65, s=34)
        means: dict[Any, list[float]] = {}
        for value, objective in points:
            means.setdefault(value, []).append(objective)
        if 2 * len(means) <= len(points):  # else they are drawn from a range, and a line through them says nothing
            line = sorted((at(value), sum(of) / len(of)) for value, of in means.items())
            axes.plot(*zip(*line, strict=True), color=ABILITIES, linewidth=2)
        axes.set_title(_short(name), loc="left", fontsize=12, color=INK)
        plain_axes(axes, "objective" if axes is panels[0] else "")
    for axes in panels[len(fields) :]:
        axes.set_visible(False)
    return figure


def rank_and_cost(summary: Mapping[str, Any]) -> Figure:
    """Accuracy on the task, and training seconds and parameters, by LoRA rank."""
    trials = _done(summary)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    which = HELD_OUT if trials[0]["metrics"].get(HELD_OUT) is not None else "accuracy"
    labels = (f"accuracy, {WORDS[which]}", "training, seconds", "parameters, millions")
    for axes, key, label in zip(panels, (which, "training_seconds", "cost"), labels, strict=True):
        at = _axis(axes, [t["values"]["expert.rank"] for t in trials])
        axes.scatter([at(t["values"]["expert.rank"]) for t in trials], [t["metrics"][key] for t in trials],
                     color=TASKS, alpha=0.65, s=34)  # fmt: skip
        if key != which:
            axes.set_ylim(0, 1.08 * max(t["metrics"][key] for t in trials) or 1)
        axes.set_xlabel("LoRA rank", color=MUTED, fontsize=11)
        plain_axes(axes, label)
    return figure


def temperature_curves(summary: Mapping[str, Any]) -> Figure:
    """Accuracy on the task, on the others and on the base abilities by router temperature, a line per training."""
    tried = [t for t in _done(summary) if "router.temperature" in t["point"]]
    trials = sorted(tried, key=lambda t: t["values"]["router.temperature"])
    metrics = [n for n in ("accuracy", "others", "abilities") if all(t["metrics"].get(n) is not None for t in trials)]
    experts = list(dict.fromkeys(t["metrics"]["expert"] for t in sorted(trials, key=lambda t: t["number"])))
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _axis(axes, [t["values"]["router.temperature"] for t in trials])
        for i, expert in enumerate(experts):
            of = [t for t in trials if t["metrics"]["expert"] == expert]
            axes.plot([t["values"]["router.temperature"] for t in of], [t["metrics"][metric] for t in of], marker="o",
                      color=CYCLE[i % len(CYCLE)], label=_training(of[0]))  # fmt: skip
        axes.set_xlabel("router temperature", color=MUTED, fontsize=11)
        axes.set_title(WORDS[metric], loc="left", fontsize=12, color=INK)
        plain_axes(axes, "accuracy" if metric == metrics[0] else "")
    if len(experts) <= 12:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10)
    return figure


def pareto(summary: Mapping[str, Any]) -> Figure:
    """Accuracy on the task against what all others keep, the size by parameters; trials that no other one beats in orange."""
    trials = _done(summary)
    kept = [n for n in ("others", "abilities") if all(t["metrics"].get(n) is not None for t in trials)]
    which = HELD_OUT if trials[0]["metrics"].get(HELD_OUT) is not None else "accuracy"
    pairs: list[tuple[str, str]] = [("cost", which), *((name, which) for name in kept)]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for front in (False, True):
            of = [t for t in trials if (t["number"] in summary["pareto"]) == front]
            axes.scatter([t["metrics"][x] for t in of], [t["metrics"][y] for t in of], s=70 if front else 34,
                         color=ABILITIES if front else TASKS, alpha=0.8 if front else 0.5,
                         label="no other trial beats it" if front else "other trials")  # fmt: skip
        axes.set_xlabel(WORDS[x], color=MUTED, fontsize=11)
        plain_axes(axes, f"accuracy, {WORDS[y]}" if x == "cost" else "")
    figure.axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=11)
    return figure


def _differs(summary: Mapping[str, Any], name: str) -> bool:
    return len({repr(t["point"][name]) for t in _done(summary) if name in t["point"]}) > 1


Drawing = tuple[str, str, Callable[[Mapping[str, Any]], Figure], Callable[[Mapping[str, Any]], bool]]

PLOTS: dict[str, Drawing] = {
    "parallel": (
        "All trials",
        "A line per evaluated trial, through the values that differ and what came out; darker is better, the best is orange.",
        parallel_coordinates,
        lambda summary: len(_done(summary)) > 1,
    ),
    "fields": (
        "By field",
        "Objective by the values of each field; the orange line is the mean over the trials with the same value.",
        by_field,
        lambda summary: len(_done(summary)) > 1 and any(_differs(summary, n) for n in _done(summary)[0]["values"]),
    ),
    "rank": (
        "Rank, accuracy and cost",
        "What a larger LoRA gives, and what it takes.",
        rank_and_cost,
        lambda summary: _differs(summary, "expert.rank"),
    ),
    "temperature": (
        "Router temperature",
        "Accuracy by the router's temperature, a line per training.",
        temperature_curves,
        lambda summary: _differs(summary, "router.temperature"),
    ),
    "pareto": (
        "What must be given up for what",
        "Accuracy on the task against the expert's parameters, and against what the pool keeps elsewhere.",
        pareto,
        lambda summary: len(_done(summary)) > 1,
    ),
}
"""Title, caption, drawing and whether a summary has its data, by file stem."""


def _done(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [trial for trial in summary["trials"] if trial["status"] == "done"]


def _short(name: str) -> str:
    return name.replace("expert.", "").replace("_", " ") if name.startswith("expert.") else name.replace(".", " ")


def _training(trial: Mapping[str, Any]) -> str:
    """Names a training by the values that it depends on."""
    values = [f"{_short(n)} {shown(v)}" for n, v in trial["values"].items() if n.startswith("expert.") or n == "seed"]
    return ", ".join(values) or "the stream's expert"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_logarithmic(values: Sequence[float]) -> bool:
    """Whether values are better shown by magnitude: such as ranks and learning rates."""
    return min(values) > 0 and max(values) / min(values) >= 8


APART = 0.18
"""Least distance between two labels of an upright axis, as a share of it."""


class _Scale:
    """One upright axis: where on it, from 0 to 1, a value stands."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._numbers = all(map(_is_number, values))
        self._values: list[Any] = sorted(set(values)) if self._numbers else list(dict.fromkeys(map(str, values)))
        self._log = self._numbers and _is_logarithmic(self._values)
        self._low, self._high = _ends([self._number(value) for value in self._values])

    def _number(self, value: Any) -> float:
        if not self._numbers:
            return float(self._values.index(str(value)))
        return math.log(value) if self._log else float(value)

    def place(self, value: Any) -> float:
        return (self._number(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns place and label of values that stand apart from each other, both ends among them."""
        lowest, *between, highest = self._values if len(self._values) > 1 else self._values * 2
        chosen = [lowest]
        for value in between:
            if min(self.place(value) - self.place(chosen[-1]), self.place(highest) - self.place(value)) >= APART:
                chosen.append(value)
        return [(self.place(value), shown(value)) for value in dict.fromkeys([*chosen, highest])]


def _axis(axes: Axes, values: Sequence[Any]) -> Callable[[Any], float]:
    """Prepares the x axis for a field's values; returns where a value stands."""
    if not all(map(_is_number, values)):
        names = list(dict.fromkeys(map(str, values)))
        axes.set_xticks(range(len(names)), [fill(shown(name), WRAPPED) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        return lambda value: float(names.index(str(value)))
    if _is_logarithmic(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    different = sorted(set(values))
    if len(different) <= 6:
        axes.set_xticks(different, [shown(value) for value in different])
    else:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return float
