"""How much memory a job takes: the sum over all processes that it started on this machine."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

GROWTH = 1.01
"""Factor by which memory must have grown, by the quick figure, to be measured again."""

T = TypeVar("T")


class PeakMemory:
    """Samples the proportional set size of this process and all below it; `bytes` is the peak so far, within 1 %.

    Proportional: memory that processes share (libraries, Ray's object store) counts once. For that the kernel walks all
    pages of each process, which takes a tenth of a core at every two seconds and holds that process up; so it is measured
    where a quick figure has grown. A local Ray's processes are children of the driver; those of a running cluster are not,
    and are not counted.
    """

    def __init__(self, every: float = 2.0) -> None:
        self.bytes = 0
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        highest = 0
        while not self._stop.wait(self._every):
            if (quick := _quick_bytes()) > highest * GROWTH:
                highest = quick
                self.bytes = max(self.bytes, memory_bytes())


def memory_bytes() -> int:
    """Returns the proportional set size of this process and its descendants, in bytes."""

    def proportional(process: Path) -> int:
        lines = (process / "smaps_rollup").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    return sum(_of_processes(proportional))


def _quick_bytes() -> int:
    """Returns about the same, from counters: what processes have to themselves, and the most that one of them shares."""

    def private_and_shared(process: Path) -> tuple[int, int]:
        _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
        return resident - shared, shared

    private, shared = zip(*_of_processes(private_and_shared), strict=True)
    return (sum(private) + max(shared)) * os.sysconf("SC_PAGE_SIZE")


def _of_processes(measure: Callable[[Path], T]) -> Iterator[T]:
    """Yields what `measure` finds in `/proc/<pid>` of this process and its descendants."""
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended meanwhile
            yield measure(Path(f"/proc/{process.pid}"))
