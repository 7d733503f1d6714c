"""The report's plots, each a function from a run's summary to a matplotlib Figure.

- Figures are made without pyplot: no global state, so threads may draw in parallel.
- Colours are Okabe and Ito's, which colour-blind readers can distinguish; blue is always the new tasks (or this method),
  orange the base abilities (or the alternative). Widths are 12 inches: 1200 pixels at 100 dpi.
- `PLOTS` lists them in the report's order with title, caption and what a summary must hold to be drawn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from pipeline.routing.insight import Explanation

INK, MUTED, LINE = "#1c2430", "#5f6b7a", "#d9dee5"
TASKS, ABILITIES = "#0072B2", "#E69F00"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4d4d4d")
DASHES = ("-", "--", ":", "-.")
HEAT = LinearSegmentedColormap.from_list("heat", ["#f4f8fc", "#b5d4ea", "#4f9bcb", "#0072B2", "#00395c"])

METHODS: dict[str, str] = {
    "base": "base,\nnothing\nlearned",
    "oracle": "oracle\nrouting\n(upper bound)",
    "sequential": "sequential\nfine-tuning",
    "replay": "sequential,\n5 % replay",
    "ewc": "sequential,\nEWC",
    "multitask": "multi-task,\nall data\nat once",
    "multitask_base": "multi-task\nwith base\nprompts",
    "token_phatgoose": "experts,\nPHATGOOSE\nrouter",
    "token": "experts,\ntoken router",
    "prompt": "experts,\nprompt router",
    "two_level": "experts,\ntwo-level\nrouter",
}
"""Labels of the methods of a comparison, in the order shown."""

OURS = ("token_phatgoose", "token", "prompt", "two_level")
"""Methods that route by themselves; shown in bold."""

GAP = 0.4
"""Space between tasks and base abilities in heat maps, in cells."""


def accuracy_over_time(summary: Mapping[str, Any]) -> Figure:
    """Heat map of the accuracy matrix: a row per state of the pool (rows without values are left out)."""
    matrix = summary["accuracy_matrix"]
    kept = [i for i, values in enumerate(matrix["values"]) if any(value is not None for value in values)]
    labels = ["base" if i == 0 else f"after {matrix['rows'][i]}" for i in kept]
    figure, axes = _figure(1.7 + 0.46 * len(kept))
    _heat(axes, [matrix["values"][i] for i in kept], labels, matrix["columns"], len(matrix["tasks"]))
    for y, i in enumerate(kept):
        if i > 0:  # the task learned in this row
            axes.add_patch(Rectangle((i - 1, y), 1, 1, fill=False, edgecolor=ABILITIES, linewidth=2.2))
    return figure


def routing_map(summary: Mapping[str, Any]) -> Figure:
    """Heat map of routing: experts by tasks and benchmarks; the shares of each column sum to 1."""
    routing = summary["routing"]
    split = sum(column in set(routing["experts"]) for column in routing["columns"])
    figure, axes = _figure(1.7 + 0.46 * len(routing["experts"]))
    _heat(axes, routing["shares"], routing["experts"], routing["columns"], split, hide_zero=True)
    return figure


def methods_side_by_side(summary: Mapping[str, Any]) -> Figure:
    """Bars of accuracy on new tasks and base abilities, for the methods that the summary holds."""
    methods = summary["methods"]
    names = ordered_methods(methods)
    figure, axes = _figure(4.4)
    for key, label, colour, shift in (
        ("new", "new tasks", TASKS, -0.2),
        ("base_abilities", "base abilities", ABILITIES, 0.2),
    ):
        bars = {x + shift: methods[name][key] for x, name in enumerate(names) if methods[name][key] is not None}
        spreads = [method.get("spread", {}).get(key) for method in map(methods.get, names) if method[key] is not None]
        errors = [math.nan if spread is None else spread for spread in spreads] if any(spreads) else None
        drawn = axes.bar(
            list(bars), list(bars.values()), 0.37, yerr=errors, color=colour, ecolor=MUTED, capsize=3, label=label
        )
        axes.bar_label(drawn, [f"{height:.1%}" for height in bars.values()], padding=4, fontsize=11, color=INK)
    base_accuracy = methods.get("base", {}).get("base_abilities")
    if base_accuracy is not None:
        axes.axhline(base_accuracy, color=ABILITIES, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xticks(range(len(names)), [METHODS.get(name, name) for name in names], fontsize=11)
    for name, tick in zip(names, axes.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if name in OURS else "normal")
    axes.set_xlim(-0.6, max(len(names), 3) - 0.4)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain_axes(axes, "accuracy")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=11)
    return figure


def cost_by_tasks(summary: Mapping[str, Any]) -> Figure:
    """Cumulative training seconds and samples by number of tasks, against retraining on all tasks at every arrival."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, unit, lines in zip(panels, ("seconds", "samples"), cost(summary), strict=True):
        ours, retraining = lines
        counts = range(1, len(ours) + 1)
        axes.plot(
            counts, retraining, color=CYCLE[1], linestyle="--", marker="s", label="multi-task retraining (computed)"
        )
        axes.plot(counts, ours, color=TASKS, marker="o", linewidth=2.2, label="one expert per task (measured)")
        for line, colour in ((retraining, CYCLE[1]), (ours, TASKS)):
            axes.annotate(f" {line[-1]:,.0f}", (len(ours), line[-1]), color=colour, va="center", xytext=(6, 0),
                          textcoords="offset points", fontsize=11, annotation_clip=False)  # fmt: skip
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(0, 1.08 * max(*ours, *retraining, 1))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("tasks learned", color=MUTED, fontsize=11)
        plain_axes(axes, f"training {unit}, cumulative")
        axes.legend(loc="upper left", frameon=False, fontsize=11)
    return figure


def loss_curves(summary: Mapping[str, Any]) -> Figure:
    """Training loss by step of the expert stage and, where it has steps, of the router stage; logarithmic."""
    tasks = summary["tasks"]
    stages = [(key, title) for key, title in (("expert_loss", "expert stage"), ("router_loss", "router stage"))
              if any(task.get(key) for task in tasks.values())]  # fmt: skip
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (key, title) in zip(panels, stages, strict=True):
        for i, (name, task) in enumerate(tasks.items()):
            steps, losses = zip(*task.get(key) or [(None, None)], strict=True)
            style = DASHES[i // len(CYCLE) % len(DASHES)]
            axes.plot(steps, losses, color=CYCLE[i % len(CYCLE)], linestyle=style, linewidth=1.6, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("step", color=MUTED, fontsize=11)
        axes.set_title(title, loc="left", fontsize=12, color=INK)
        plain_axes(axes, "loss on answer tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=11)
    return figure


def reliability(summary: Mapping[str, Any]) -> Figure:
    """Reliability diagram: share of right choices by posterior, and how many choices each bin holds."""
    bins = summary["calibration"]["bins"]
    filled = [i for i, count in enumerate(bins["counts"]) if count]
    counts = [bins["counts"][i] for i in filled]
    width = 1 / len(bins["counts"])
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes, histogram = figure.subplots(1, 2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
    centres = [(i + 0.5) * width for i in filled]
    rights = [bins["right"][i] / bins["counts"][i] for i in filled]
    said = [bins["posteriors"][i] / bins["counts"][i] for i in filled]
    axes.bar(centres, rights, 0.9 * width, color=TASKS, label="right")
    axes.scatter(said, rights, color=ABILITIES, zorder=3, label="mean posterior of the bin")
    axes.legend(loc="upper left", frameon=False, fontsize=11)
    histogram.bar(centres, counts, 0.9 * width, color=TASKS)
    histogram.set_yscale("symlog", linthresh=1)
    histogram.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for panel, label in ((axes, "share of right choices"), (histogram, "prompts (logarithmic)")):
        panel.set_xlim(0, 1.01)
        panel.set_xlabel("posterior of the choice", color=MUTED, fontsize=11)
        plain_axes(panel, label)
    axes.set_ylim(0, 1.05)
    return figure


def ordered_methods(methods: Mapping[str, Any]) -> list[str]:
    """Returns the names of the methods at hand: the known ones in their usual order, then any others."""
    return [name for name in METHODS if name in methods] + [name for name in methods if name not in METHODS]


def cost(summary: Mapping[str, Any]) -> list[tuple[list[float], list[float]]]:
    """Returns (ours, retraining) cumulative over the tasks, for seconds and then for samples.

    Ours is measured: the sum over tasks i <= k. Retraining at the arrival of task k trains on all k tasks; it costs as much as
    the comparison's multi-task run (without one, the sum over all tasks) times Σ_{i<=k} n_i / Σ_i n_i,
    where n_i is the number of samples of task i.
    """
    tasks = list(summary["tasks"].values())
    samples = [float(task["samples"]) for task in tasks]
    multitask = (summary.get("methods") or {}).get("multitask", {})
    curves = []
    for key in ("seconds", "samples"):
        by_task = [float(task[key]) for task in tasks]
        total = float(multitask.get(key) or sum(by_task))
        once = [total * seen / max(sum(samples), 1.0) for seen in accumulate(samples)]
        curves.append((list(accumulate(by_task)), list(accumulate(once))))
    return curves


def cost_caption(summary: Mapping[str, Any]) -> str:
    """Returns the caption of `cost_by_tasks`: what was measured and what was computed."""
    if (summary.get("methods") or {}).get("multitask", {}).get("seconds"):
        source = "the measured multi-task run, scaled by the share of the samples seen so far"
    else:
        source = "the measured seconds per sample of this run (no multi-task run was made)"
    return (
        "A new task costs its own training only, however many came before. Multi-task retraining would train on every "
        f"task seen so far at each arrival; its line is computed, not measured, from {source}."
    )


@dataclass(frozen=True)
class Plot:
    """A plot of the report: title, functions that draw and caption it, and whether a summary has its data."""

    title: str
    draw: Callable[[Mapping[str, Any]], Figure]
    caption: Callable[[Mapping[str, Any]], str]
    possible: Callable[[Mapping[str, Any]], bool]


PLOTS: dict[str, Plot] = {
    "methods": Plot(
        "Methods side by side",
        methods_side_by_side,
        lambda summary: (
            "Mean accuracy on the new tasks and on the base abilities; the dashed line is the base's accuracy on its abilities."
        ),
        lambda summary: bool(summary.get("methods")),
    ),
    "accuracy": Plot(
        "Accuracy after every task",
        accuracy_over_time,
        lambda summary: (
            "Accuracy in percent. A row is the pool after learning the outlined task; a column is a task or benchmark."
        ),
        lambda summary: any(value is not None for row in summary["accuracy_matrix"]["values"] for value in row),
    ),
    "routing": Plot(
        "Who answered",
        routing_map,
        lambda summary: (
            "Percent of each column's prompts that went to each expert after the last task; “base” adds no expert."
        ),
        lambda summary: bool(summary.get("routing")),
    ),
    "calibration": Plot(
        "What a posterior is worth",
        reliability,
        lambda summary: (
            "Share of right choices by the router's posterior, and number of prompts; expected calibration error "
            f"{summary['calibration']['error']:.4f} (Guo et al. 2017, 15 bins)."
        ),
        lambda summary: bool(summary.get("calibration")),
    ),
    "cost": Plot("Cost by number of tasks", cost_by_tasks, cost_caption, lambda summary: bool(summary["tasks"])),
    "loss": Plot(
        "Training loss",
        loss_curves,
        lambda summary: "Loss by optimizer step, every task on its own data only. A closed-form router has no loss.",
        lambda summary: any(t.get("expert_loss") or t.get("router_loss") for t in summary["tasks"].values()),
    ),
}
"""Plots by file stem, in the report's order."""


def routing_of_a_prompt(explanation: Explanation, tokens: Sequence[str]) -> Figure:
    """Heat maps of one prompt: weight of each active expert, Linears by tokens; equal neighbouring tokens share a column."""
    runs: list[list[int]] = []
    for i, token in enumerate(tokens):
        if runs and tokens[runs[-1][0]] == token:
            runs[-1].append(i)
        else:
            runs.append([i])
    labels = [tokens[run[0]].strip() or "␣" for run in runs]
    labels = [f"{label} ×{len(run)}" if len(run) > 1 else label for label, run in zip(labels, runs, strict=True)]
    paths = list(explanation.weights)
    taking_part = {name: weight for name, weight in explanation.decision.weights.items() if weight >= 0.01}
    shown: list[str | None] = [*sorted(taking_part, key=taking_part.__getitem__, reverse=True)[:4]] or [None]
    cells_LTE = [[explanation.weights[path][run].mean(0).tolist() for run in runs] for path in paths]
    figure = Figure(figsize=(12, 2.2 + len(shown) * (0.6 + 0.13 * len(paths))), layout="constrained")
    for axes, name in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        expert = None if name is None else explanation.experts.index(name)
        values = [[0.0 if expert is None else cell[expert] for cell in row] for row in cells_LTE]
        image = axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        axes.set_title(name or "the base alone", loc="left", color=INK, fontsize=12, fontweight="bold")
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=9, parse_math=False)
        step = max(1, len(paths) // 28)
        axes.set_yticks(range(0, len(paths), step), [_short(path) for path in paths[::step]], fontsize=7)
        axes.tick_params(length=0, colors=INK)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.02, format=PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)
    return figure


def _short(path: str) -> str:
    """Writes the path of a Linear as layer number and name."""
    numbers = [part for part in path.split(".") if part.isdigit()]
    return f"{'.'.join(numbers)} {path.rpartition('.')[2]}"


def _figure(height: float) -> tuple[Figure, Axes]:
    """Returns a figure of 12 inches by `height` inches with one pair of axes."""
    figure = Figure(figsize=(12, height), layout="constrained")
    return figure, figure.subplots()


def plain_axes(axes: Axes, label: str) -> None:
    """Reduces the frame to a base line and faint horizontal lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=11)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(label, color=MUTED, fontsize=11)


def _heat(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    split: int,
    hide_zero: bool = False,
) -> None:
    """Draws fractions as shaded cells with their percentages and a gap before column `split`; None stays white."""
    lefts = [j + (GAP if j >= split else 0.0) for j in range(len(columns))]
    for y, row in enumerate(values):
        for x, value in zip(lefts, row, strict=True):
            shade = "#ffffff" if value is None else HEAT(value)
            axes.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, facecolor=shade, edgecolor=LINE, linewidth=0.6))
            text = "—" if value is None else f"{100 * value:.0f}"
            if not (hide_zero and text == "0"):
                colour = MUTED if value is None else "white" if value > 0.55 else INK
                axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=11, color=colour)
    axes.set_xlim(-0.05, len(columns) + (GAP if split < len(columns) else 0.0) + 0.05)
    axes.set_ylim(len(rows) + 0.05, -0.65)
    for label, start, end in (("new tasks", 0, split), ("base abilities", split, len(columns))):
        if end > start:
            axes.text(lefts[start] + 0.03, -0.15, label, fontsize=11, color=MUTED, va="bottom")
    axes.set_xticks([x + 0.5 for x in lefts], columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=11)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, fontsize=11)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
