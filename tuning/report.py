"""The report of a sweep: one self-contained HTML file, and its plots as PNG files beside it. Reads the summary alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.evaluation.report import environment, save_figure
from tuning.objective import HELD_OUT
from tuning.plots import PLOTS
from tuning.results import SHOWN, WORDS, shown


def write_report(summary: Mapping[str, Any], folder: Path) -> Path:
    """Writes `report.html` and `plots/*.png` into `folder`; returns the page's path."""
    pages = environment(Path(__file__).parent)
    pages.filters["shown"] = shown
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    drawn = []
    for stem, (title, caption, draw, possible) in PLOTS.items():
        path = plots / f"{stem}.png"
        if not possible(summary):
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        drawn.append({"title": title, "caption": caption, "image": save_figure(draw(summary), path)})
    trials = summary["trials"]
    page = pages.get_template("sweep.html.j2").render(
        summary=summary,
        best=next((trial for trial in trials if trial["number"] == summary["best"]), None),
        fields=list(trials[0]["values"]) if trials else [],
        metrics={name: WORDS[name] for name in SHOWN if any(t["metrics"].get(name) is not None for t in trials)},
        held_out=any(trial["metrics"].get(HELD_OUT) is not None for trial in trials),
        plots=drawn,
    )
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    return file
