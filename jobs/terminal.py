"""What a job shows in the terminal: progress with task, stage, loss and time left; lines of what is done; closing tables."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipeline.config import without_secrets

if TYPE_CHECKING:  # tables take no Ray
    from pipeline.training.telemetry import Step

LINE_SECONDS = 10.0
"""Seconds between two lines on rows, where the output is a file or a job's log."""

WIDTH = 160
"""Columns of tables where the output is a file or a job's log."""


class Terminal:
    """Progress bars on a terminal; plain lines where the output is a file or a job's log.

    May be used by several threads: all that goes on at a time has a bar.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = WIDTH
        self._progress: Progress | None = None
        self._shown = 0
        self._lock = threading.Lock()

    def log(self, text: str, style: str = "") -> None:
        """Prints a line above the bars, all of it in a style of rich's; brackets in it are brackets."""
        self.console.print(Text(without_secrets(text), style=style), soft_wrap=True)

    def show(self, drawn: object) -> None:
        """Prints a table."""
        self.console.print(drawn)

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """Shows that something goes on; yields what is told how far it is."""
        if not self.console.is_terminal:
            self.log(f"  {text} ...")
        with self._bars() as progress:
            if progress is None:
                yield lambda done: None
                return
            shown = progress.add_task(text, total=None, detail="")
            try:
                yield lambda done: progress.update(shown, detail=done)
            finally:
                progress.remove_task(shown)

    @contextmanager
    def training(self, task: str) -> Iterator["TrainingBar"]:
        """Shows the stages of one task."""
        with self._bars() as progress:
            bar = TrainingBar(self, task, progress)
            try:
                yield bar
            finally:
                bar.close()

    @contextmanager
    def rows(self, text: str, total: int | None) -> Iterator["RowBar"]:
        """Shows how many rows of about `total` (None: unknown) are done."""
        with self._bars() as progress:
            bar = RowBar(self, text, total, progress)
            try:
                yield bar
            finally:
                bar.close()

    @contextmanager
    def _bars(self) -> Iterator[Progress | None]:
        """Yields the bars of all that goes on, None where there is no terminal to show them on."""
        if not self.console.is_terminal:
            yield None
            return
        with self._lock:
            if self._progress is None:
                columns = (
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=16),
                    TextColumn("{task.fields[detail]}", markup=False),
                    _Time(),  # all of it fits into 80 columns
                )
                self._progress = Progress(*columns, console=self.console, transient=True)
                self._progress.start()
            self._shown += 1
            progress = self._progress
        try:
            yield progress
        finally:
            with self._lock:
                self._shown -= 1
                if not self._shown:
                    progress.stop()
                    self._progress = None


class _Time(ProgressColumn):
    """The time left, or, of something without a known length, the time that it has taken."""

    def __init__(self) -> None:
        super().__init__()
        self._left, self._elapsed = TimeRemainingColumn(compact=True), TimeElapsedColumn()

    def render(self, task: Task) -> Text:
        """Called by rich."""
        return self._elapsed.render(task) if task.total is None else self._left.render(task).append(" left")


class TrainingBar:
    """Turns training steps into bars, or into a line every quarter of a stage."""

    def __init__(self, terminal: Terminal, task: str, progress: Progress | None) -> None:
        self._terminal, self._progress = terminal, progress
        self._bars: dict[str, TaskID] = {}
        if progress is not None:
            self._bars["starting"] = progress.add_task(f"{task}: starting workers", total=None, detail="")

    def update(self, steps: "Sequence[Step]") -> None:
        """Shows the latest of these steps."""
        for step in steps:
            if step.remark:
                self._terminal.log(f"  {step.remark}")
                continue
            if self._progress is None:
                if step.step % max(1, step.steps // 4) == 0 or step.step == step.steps:
                    self._terminal.log(
                        f"  {step.task}: {step.stage} stage {step.step}/{step.steps}, loss {step.loss:.3f}"
                    )
                continue
            if (starting := self._bars.pop("starting", None)) is not None:
                self._progress.remove_task(starting)
            if step.stage not in self._bars:
                name = f"{step.task}: {step.stage} stage"
                self._bars[step.stage] = self._progress.add_task(name, total=step.steps, detail="")
            detail = f"{step.step}/{step.steps} loss {step.loss:.3f}"
            self._progress.update(self._bars[step.stage], completed=step.step, detail=detail)

    def close(self) -> None:
        """Takes the bars away."""
        while self._progress is not None and self._bars:
            self._progress.remove_task(self._bars.popitem()[1])


class RowBar:
    """Turns numbers of rows into a bar, or into a line every LINE_SECONDS."""

    def __init__(self, terminal: Terminal, text: str, total: int | None, progress: Progress | None) -> None:
        self._terminal, self._text, self._total, self._progress = terminal, text, total, progress
        self._shown = monotonic()
        self._bar = None if progress is None else progress.add_task(f"{text}: starting workers", total=None, detail="")

    def update(self, done: int, per_second: float | None) -> None:
        """Shows how many rows are done, at which speed, and how long the others take."""
        of_all = f"{done:,}" + (f" of {max(done, self._total):,}" if self._total else "")
        speed = "" if per_second is None else f", {per_second:.1f} rows/s"
        if self._progress is not None and self._bar is not None:
            if per_second is not None:
                self._progress.update(self._bar, description=self._text, total=self._total)
            self._progress.update(self._bar, completed=done, detail=of_all + speed)
        elif monotonic() - self._shown > LINE_SECONDS:
            self._shown = monotonic()
            left = ""
            if per_second and self._total:
                left = f", {timedelta(seconds=round(max(0, self._total - done) / per_second))} left"
            self._terminal.log(f"  {self._text} {of_all}{speed}{left}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None and self._bar is not None:
            self._progress.remove_task(self._bar)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> Table:
    """Returns a table whose first column is text and whose others are figures, or with `text` texts too."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    longest = max(
        (Text.from_markup(row[0]).cell_len for row in rows), default=0
    )  # names are not cut where the terminal is narrow
    for number, name in enumerate(header):
        if number == 0:
            drawn.add_column(name, justify="left", min_width=longest)
        else:
            drawn.add_column(name, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    for row in rows:
        drawn.add_row(*(map(Text, row) if text else row))  # brackets in texts are brackets
    return drawn


def methods_table(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the comparison of methods."""
    rows = [
        [name, _accuracy(m, "new"), _accuracy(m, "base_abilities"), f"{m['samples']:,}", f"{m['seconds']:.0f}"]
        for name, m in methods.items()
    ]
    return table("Methods", ["method", "new tasks", "base abilities", "training samples", "training seconds"], rows)


def _accuracy(method: Mapping[str, Any], key: str) -> str:
    """Returns an accuracy, with its spread over several seeds; a dash where there was nothing to measure it on."""
    if method[key] is None:
        return "-"
    spread = method.get("spread", {}).get(key)
    return f"{method[key]:.3f}" if spread is None else f"{method[key]:.3f} ± {spread:.3f}"


def print_json(value: Any) -> None:
    """Prints a result as JSON, to be read by programs."""
    typer.echo(json.dumps(value, indent=2))
