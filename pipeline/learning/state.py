"""State of a run that survives restarts: JSON files, seconds, counts."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import stored_file
from pipeline.files import write_json

REMADE = "delete this file, and the same command makes it anew"
"""What to do about a damaged file of a run."""


def read_json(file: Path) -> dict[str, Any]:
    """Reads an object that `write_json` wrote; raises StoredFileError where it is damaged."""
    with stored_file(file, REMADE):
        value = json.loads(file.read_text())
        if not isinstance(value, dict):
            raise TypeError(f"an object was expected, found {type(value).__name__}")
        return value


class Stopwatch:
    """Seconds that a run has taken over all restarts; written to a file now and then, so that a kill loses few."""

    def __init__(self, file: Path, *, every: float = 5.0) -> None:
        self._file, self._every, self._lock, self._stopped = file, every, threading.Lock(), threading.Event()
        with stored_file(file, REMADE):
            self._before = float(json.loads(file.read_text())["seconds"]) if file.exists() else 0.0
        self._started = time.monotonic()
        threading.Thread(target=self._go, name="stopwatch", daemon=True).start()

    def lap(self) -> float:
        """Returns the seconds so far and writes them down."""
        with self._lock:
            seconds = self._before + time.monotonic() - self._started
            write_json(self._file, {"seconds": seconds})
        return seconds

    def stop(self) -> float:
        """Returns the seconds so far and writes them down for the last time."""
        self._stopped.set()
        return self.lap()

    def _go(self) -> None:
        with suppress(OSError):  # told where the lap counts
            while not self._stopped.wait(self._every):
                self.lap()


def keep_peak(file: Path, now: int) -> int:
    """Returns the largest of the numbers that were kept in a file over all restarts, and keeps it."""
    peak = max(now, int(read_json(file)["peak"]) if file.exists() else 0)
    write_json(file, {"peak": peak})
    return peak


class Tally:
    """A count over all restarts of a run, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with stored_file(file, REMADE):
            self.count = int(json.loads(file.read_text())["count"]) if file.exists() else 0

    def add(self, count: int) -> None:
        """Adds to the count and writes it."""
        self.count += count
        write_json(self._file, {"count": self.count})
