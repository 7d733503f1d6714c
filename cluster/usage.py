"""How much memory a job takes: the sum over all processes that it started on this machine."""

import threading
from pathlib import Path

import psutil


class PeakMemory:
    """Samples the proportional set size of this process and all below it; `bytes` is the peak so far.

    Proportional: memory that processes share (libraries, Ray's object store) counts once. A local Ray's processes are
    children of the driver; those of a running cluster are not, and are not counted.
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
        while not self._stop.wait(self._every):
            self.bytes = max(self.bytes, memory_bytes())


def memory_bytes() -> int:
    """Returns the proportional set size of this process and its descendants, in bytes."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
