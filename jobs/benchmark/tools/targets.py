"""Figures of a benchmark beside the most that each should be."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from jobs.terminal import table


def targets_table(title: str, measured: Mapping[str, Any], most: Mapping[str, float]) -> Table:
    """Returns a row per target: its name, what was measured, the target, and whether it is reached."""
    rows = [
        [name, _shown(measured[name]), f"<= {_shown(bound)}", "yes" if measured[name] <= bound else "NO"]
        for name, bound in most.items()
    ]
    return table(title, ["figure", "measured", "target", "reached"], rows)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
