"""Converts a published InternVL2 folder, so that `base.path` can name it.

python -m jobs.convert_internvl2 models/InternVL2-2B models/InternVL2-2B-hf
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.terminal import Terminal
from pipeline.models import internvl2

Source = Annotated[
    Path, typer.Argument(help="Folder as OpenGVLab publishes it: 1B, 2B, 4B, 8B, 26B, 40B or 76B.", metavar="SRC")
]
Target = Annotated[Path, typer.Argument(help="Folder to write, e.g. models/InternVL2-2B-hf.", metavar="DST")]


def main(
    source: Source,
    target: Target,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is not empty.")] = False,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest file of weights in GB; so much memory is used.")
    ] = 4.0,
) -> None:
    """Convert an InternVL2 checkpoint to transformers' own layout, without running the code that comes with it."""
    terminal = Terminal()
    started = time.monotonic()
    with user_errors(), _bar(terminal, source.name) as progress:
        done = internvl2.convert(
            source, target, force=force, shard_bytes=int(shard_gb * internvl2.GB), progress=progress
        )
    terminal.log(f"converted  {source} -> {done.folder}")
    terminal.log(
        f"weights    {done.parameters:,} parameters, {done.nbytes / internvl2.GB:.2f} GB in {done.files} "
        f"{'file' if done.files == 1 else 'files'}, {time.monotonic() - started:.0f} s"
    )
    terminal.log(f"use it as  base.path={done.folder}")


@contextmanager
def _bar(terminal: Terminal, name: str) -> Iterator[internvl2.Progress]:
    """Shows how much is written: a bar on a terminal, a line a file elsewhere."""
    if not terminal.console.is_terminal:
        yield lambda done, total: terminal.log(f"  {name}: {done / internvl2.GB:.2f} of {total / internvl2.GB:.2f} GB")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=terminal.console, transient=True) as shown:
        bar = shown.add_task(name, total=None)
        yield lambda done, total: shown.update(bar, completed=done, total=total)


if __name__ == "__main__":
    run_alone(main)
