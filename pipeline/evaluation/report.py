"""The report of a run: one self-contained HTML file, and its plots as PNG files beside it.

- Reads only a run's summary (the content of `summary.json`), so any old run can be reported again.
- Parts that a summary lacks (methods, routing, samples) are left out.
- The page needs no network and no script; it follows the reader's light or dark setting and prints.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from pipeline.config import without_secrets
from pipeline.errors import UserError
from pipeline.evaluation.former_summary import by_todays_names
from pipeline.evaluation.matrix import FORMULAS, AccuracyMatrix
from pipeline.evaluation.plots import METHODS, OURS, PLOTS, ordered_methods

DPI = 170
"""Resolution of the plots; at a width of 12 inches about 2000 pixels, sharp on dense screens and in print."""

REQUIRED = ("name", "tasks", "accuracy_matrix", "continual")


class ReportError(UserError):
    """A summary that cannot be reported; the message names the missing field and the remedy."""


def write_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Writes `report.html` and `plots/*.png` into `folder` and returns the page's path.

    Raises ReportError if the summary lacks a required field, ValueError if its matrix does not fit together.
    """
    if missing := [key for key in REQUIRED if key not in summary]:
        raise ReportError(f"summary.json: missing {', '.join(missing)}; run `pointsman learn` again to rewrite it")
    summary = by_todays_names(summary)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            summary={**summary, "command": without_secrets(summary["command"])} if "command" in summary else summary,
            headline=_headline(summary),
            plots=_draw(summary, folder / "plots"),
            methods=_methods(summary),
            over_seeds=any("spread" in method for method in (summary.get("methods") or {}).values()),
            formulas=FORMULAS,
            tasks=_tasks(summary),
        )
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def environment(*folders: Path) -> Environment:
    """Returns what renders pages: templates of `folders`, the common style, and how figures are written."""
    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,  # by name, jinja2 would not escape in a file that ends in .j2
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(percent=percent, spread=spread, duration=duration, count=count, memory=memory)
    return made


def percent(value: float | None) -> str:
    """Writes a fraction as a percentage that no line break can split; a dash for None."""
    return "—" if value is None else f"{100 * value:.1f}\u202f%"


def spread(value: float | None) -> str:
    """Writes the standard deviation of a fraction behind it, in points of a percentage; nothing for None."""
    return "" if value is None else f" ± {100 * value:.1f}"


def duration(seconds: float | None) -> str:
    """Writes seconds as "42.1 s", "3 min 20 s" or "2 h 05 min"; a dash for None."""
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float | None) -> str:
    """Writes a whole number with narrow spaces between thousands; a dash for None."""
    return "—" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def memory(size: float | None) -> str:
    """Writes bytes as MB or GB (powers of ten); a dash for None."""
    if size is None:
        return "—"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _draw(summary: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Saves the plots whose data the summary has; returns title, caption and image (base64) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for stem, plot in PLOTS.items():
        path = folder / f"{stem}.png"
        if not plot.possible(summary):
            path.unlink(missing_ok=True)  # left by an earlier report
            continue
        image = save_figure(plot.draw(summary), path)
        shown.append({"stem": stem, "title": plot.title, "caption": plot.caption(summary), "image": image})
    return shown


def save_figure(figure: Figure, path: Path) -> str:
    """Writes a figure as PNG; returns the same in base64, for a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    path.write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def _headline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the headline metrics: tasks learned, accuracy before and after, base abilities before and after."""
    matrix = AccuracyMatrix.from_json(summary["accuracy_matrix"])
    learned, last = matrix.tasks[: matrix.last], matrix.rows[matrix.last]

    def mean(row: str, columns: list[str]) -> float | None:
        values = [value for column in columns if (value := matrix.value(row, column)) is not None]
        return fmean(values) if values else None

    trained = [task["seconds"] for task in summary["tasks"].values()]
    return {
        "tasks": len(learned),
        "new_before": mean("base", learned),
        "new_after": mean(last, learned),
        "base_abilities_before": mean("base", matrix.benchmarks),
        "base_abilities_after": mean(last, matrix.benchmarks),
        "seconds_a_task": fmean(trained) if trained else None,
    }


def _methods(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the table of methods."""
    methods = summary.get("methods") or {}
    names = {name: METHODS.get(name, name).replace("\n", " ") for name in ordered_methods(methods)}
    no_spread = {"new": None, "base_abilities": None}
    return [
        {"label": label, "ours": name in OURS, **methods[name], "spread": no_spread | methods[name].get("spread", {})}
        for name, label in names.items()
    ]


def _tasks(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the table of tasks, in order of arrival, with accuracy before, just after and at the end."""
    matrix = AccuracyMatrix.from_json(summary["accuracy_matrix"])
    last = matrix.rows[matrix.last]
    rows = []
    for name, task in summary["tasks"].items():
        in_matrix = name in matrix.tasks
        accuracy = {
            "before": matrix.value("base", name) if in_matrix else None,
            "learned": matrix.value(name, name) if in_matrix else None,
            "end": matrix.value(last, name) if in_matrix else None,
        }
        rows.append({"name": name, **accuracy, **task})
    return rows
