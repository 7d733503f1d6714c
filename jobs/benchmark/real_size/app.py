"""What depends on size, measured at the sizes that matter: width, resemblance, small tasks, streamed data, answers, callers.

    pointsman benchmark real-size

Each measurement is a module of this folder with a function `measure`; one of them runs alone with `--only`.
"""

from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError
from pipeline.files import write_json
from pipeline.provenance import now, provenance

MEASUREMENTS = {
    "features": "routing with prompt features projected to 128 and 512, against unprojected ones",
    "resemblance": "tasks that resemble base abilities: prompts that reach the right expert, or the base",
    "threshold": "tasks of 100 rows: held-out prompts inside their out-of-distribution threshold",
    "loss": "gradients of one step, for several micro-batches and workers",
    "concurrent": "prompts answered from several threads at once",
    "streamed": "training from a source that is not cached, sorted by kind; leaving the loader early",
}
"""Measurements in the order in which they run, with what each of them looks at."""

TARGETS: dict[str, tuple[str, float]] = {
    "features.routed_right": (">=", 0.999),
    "resemblance.own": (">=", 0.995),
    "resemblance.base": (">=", 0.995),
    "threshold.inside_min": (">=", 0.97),
    "loss.gradient_difference": ("<=", 1e-5),
    "concurrent.wrong": ("<=", 0),
    "streamed.accuracy_ratio": (">=", 0.99),
    "streamed.hangs": ("<=", 0),
}
"""What each figure should reach."""

Only = Annotated[
    list[str] | None, typer.Option(help=f"One of {', '.join(MEASUREMENTS)}; may be given again. Default: all.")
]
Output = Annotated[Path, typer.Option(help="Folder for the summary.")]


def real_size(only: Only = None, output: Output = Path("runs/benchmark-real-size")) -> None:
    """Measure what the small default hides: width, look-alike tasks, small tasks, streamed rows, unequal answers, threads."""
    with user_errors():
        for name in only or ():
            if name not in MEASUREMENTS:
                raise ConfigError(f"--only {name}: no such measurement; there are: {', '.join(MEASUREMENTS)}")
        terminal, started = Terminal(), now()
        summary: dict[str, Any] = {
            **provenance("benchmark real-size", started),
        }
        for name in only or MEASUREMENTS:
            terminal.log(f"{name}: {MEASUREMENTS[name]}", "bold")
            began = monotonic()
            with terminal.working(f"measuring {name}"):
                measured = import_module(f"jobs.benchmark.real_size.{name}").measure()
            summary[name] = {**measured, "seconds": monotonic() - began}
            write_json(output / "summary.json", summary)
        show(terminal, summary)
        terminal.log(f"summary    {output / 'summary.json'}")


def show(terminal: Terminal, summary: dict[str, Any]) -> None:
    """Prints each figure beside its target."""
    rows = []
    for key, (sign, bound) in TARGETS.items():
        name, field = key.split(".")
        if name not in summary:
            continue
        value = summary[name][field]
        reached = value >= bound if sign == ">=" else value <= bound
        rows.append([key, f"{value:.4g}", f"{sign} {bound:g}", "yes" if reached else "NO"])
    terminal.console.print(table("Real size", ["figure", "measured", "target", "reached"], rows))
