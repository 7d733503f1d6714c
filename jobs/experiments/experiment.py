"""What an experiment is: runs that are learned and measured, a summary of their results, tables and figures of the summary.

An experiment has no learning of its own. A run is a configuration for `learning.learn_stream` (or nothing, where no expert is
needed) and a function that reads figures off it. Each run is done once per seed, and its result is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from pipeline.config import LearnConfig
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession

Result = dict[str, Any]
"""What a run measured: plain figures, as in JSON."""
Results = Mapping[str, Sequence[Result]]
"""The results of all seeds by the run's label."""
Figures = dict[str, Any]
"""An experiment's part of the summary."""
Configure = Callable[..., LearnConfig]
"""Returns a run's configuration: `configure(label, seed, stream, *overrides)` (see `settings.Settings`)."""


@dataclass(frozen=True)
class Run:
    """One run of an experiment with one seed."""

    label: str
    """The same for all seeds."""
    seed: int
    config: LearnConfig | None
    """What is learned before it is measured; None: nothing is."""
    measure: Callable[[StreamSession, LearnResult], Result] | None = None
    """Reads figures off what was learned, in the open session."""
    compute: Callable[[], Result] | None = None
    """The same where nothing is learned."""


@dataclass(frozen=True)
class Table:
    """A table of the page, cells as they are shown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    ours: frozenset[int] = frozenset()
    """Numbers of the rows that show the default router."""


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    stem: str
    """Name of its file."""
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Target:
    """A figure that should reach a bound: a number, or another figure."""

    key: str
    """Dotted, within the experiment's part of the summary."""
    sign: str
    """>= or <=."""
    bound: float | str

    def check(self, figures: Figures) -> tuple[float | None, float | None, bool | None]:
        """Returns what was measured, the bound, and whether it was reached; None where either is missing."""
        value = lookup(figures, self.key)
        bound = lookup(figures, self.bound) if isinstance(self.bound, str) else self.bound
        if value is None or bound is None:
            return value, bound, None
        return value, bound, value >= bound if self.sign == ">=" else value <= bound


@dataclass(frozen=True)
class Experiment:
    """An experiment; its module in this room is named as it is, and holds it as EXPERIMENT."""

    version: int
    """Raised where its runs measure something else than before: results of other versions are not found again."""
    runs: Callable[[int, Configure], Sequence[Run]]
    """The runs of one seed."""
    summarise: Callable[[Results], Figures]
    tables: Callable[[Figures], Sequence[Table]]
    charts: Callable[[Figures], Sequence[Chart]]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    """How it is measured, and what it does not show; sentences for the page."""


def lookup(figures: Mapping[str, Any], key: str) -> float | None:
    """Returns the number under a dotted key; None where there is none."""
    value: Any = figures
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return float(value) if isinstance(value, int | float) else None
