"""Order in which a worker reads rows of streamed parts: all epochs of a stage, or chosen rows.

Several Ray tasks read for a worker. The order does not depend on their number, which may differ between runs, and a lost
task can be restarted at any row.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pipeline.data.loading.piece_reader import LoadedRow, load, raw_row
from pipeline.data.loading.pieces import ReadRequest
from pipeline.data.loading.streamed_part import StreamedPart
from pipeline.data.loading.windows import LANES, WINDOW_BYTES, Span, Window, file_windows, lane_windows, lanes

_READ_AT_ONCE = 4
"""Windows that a task reads in parallel while it encodes others."""


@contextmanager
def _pool() -> Iterator[Executor]:
    """Yields a pool of reader threads; leaving waits for none of them."""
    pool = ThreadPoolExecutor(_READ_AT_ONCE)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Drawable:
    """Pieces of all parts, from which rows are drawn."""

    parts: tuple[StreamedPart, ...]

    @property
    def window(self) -> int:
        """Rows that are shuffled at a time."""
        return self.parts[0].origin.encoder.data.shuffle_rows

    @cached_property
    def sizes(self) -> np.ndarray:
        """Good rows of the pieces (P,)."""
        return np.concatenate([part.pieces.good for part in self.parts])

    @cached_property
    def weights(self) -> np.ndarray:
        """Bytes of the pieces (P,)."""
        return np.concatenate([part.pieces.bytes for part in self.parts])

    @cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(len(part.pieces) for part in self.parts)])

    def rows(self, windows: Iterator[Window], pool: Executor) -> Iterator[Any]:
        """Returns the rows of windows, raw or encoded; the next window is read while rows of the current one are consumed."""
        return self._rows(windows, pool, self._read(windows, pool))

    def _rows(self, windows: Iterator[Window], pool: Executor, ahead: Future[list[LoadedRow]] | None) -> Iterator[Any]:
        origins = [part.origin for part in self.parts]
        while ahead is not None:
            window, ahead = ahead.result(), self._read(windows, pool)
            for row in window:
                yield raw_row(origins[row.request.part], row)

    def _read(self, windows: Iterator[Window], pool: Executor) -> Future[list[LoadedRow]] | None:
        window = next(windows, None)
        return None if window is None else pool.submit(self._load, window)

    def _load(self, window: Window) -> list[LoadedRow]:
        """Reads the rows of a window; returns them in its order."""
        counts = window.stops - window.starts
        selected = np.zeros(int(counts.sum()), bool)
        selected[window.order] = True
        requests: list[ReadRequest] = []
        masks = np.split(selected, np.cumsum(counts)[:-1])
        for piece, start, mask in zip(window.pieces.tolist(), window.starts.tolist(), masks, strict=True):
            if mask.any():
                part = int(np.searchsorted(self._firsts, piece, "right")) - 1
                numbers = start + np.flatnonzero(mask)
                requests.append(self.parts[part].pieces.read(piece - int(self._firsts[part]), numbers, part=part))
        loaded = load([part.origin for part in self.parts], requests)
        return [loaded[index] for index in (np.cumsum(selected) - 1)[window.order].tolist()]


class Order(Protocol):
    """Order of rows, and their division among tasks."""

    def tasks(self, most: int) -> int:
        """Returns how many of `most` tasks can share them."""

    def turns(self, tasks: int) -> Iterator[int]:
        """Yields for each row which task gives it."""

    def rows(self, source: Drawable, task: int, tasks: int, first: int) -> Iterator[Any]:
        """Yields those of a task, from row `first` of all on."""


@dataclass(frozen=True)
class Drawn:
    """Rows `first` to `last` of a worker's epochs; each epoch is shuffled anew."""

    span: Span
    first: int
    last: int
    seed: int
    window: int
    """Rows that are shuffled at a time."""

    def tasks(self, most: int) -> int:
        """Returns how many of `most` tasks can share them: each has a lane at least."""
        return min(most, len(self._lanes))

    def turns(self, tasks: int) -> Iterator[int]:
        """Yields for each row which task gives it."""
        for position in range(self.first, self.last):
            yield position % len(self.span) % len(self._lanes) % tasks

    def rows(self, source: Drawable, task: int, tasks: int, first: int) -> Iterator[Any]:
        """Yields those of a task, from row `first` of all on."""
        count = len(self._lanes)
        with _pool() as pool:
            position = self.first + first
            while position < self.last:
                epoch, begin = divmod(position, len(self.span))
                end = min(len(self.span), begin + self.last - position)
                lane_rows = {
                    lane: source.rows(self._windows(source, lane, epoch, -((lane - begin) // count)), pool)
                    for lane in range(task, count, tasks)
                }
                for number in range(begin, end):
                    if number % count in lane_rows:
                        yield next(lane_rows[number % count])
                position += end - begin

    @cached_property
    def _lanes(self) -> Sequence[Span]:
        return lanes(self.span, self.window)

    def _windows(self, source: Drawable, lane: int, epoch: int, first: int) -> Iterator[Window]:
        rows, size = (-(-most // len(self._lanes)) for most in (self.window, WINDOW_BYTES))
        return lane_windows(
            source.sizes, source.weights, self._lanes[lane],
            seed=self.seed, epoch=epoch, rows=rows, size=size, first=max(0, first),
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Rows with given numbers, in rising order; tasks take windows in turn."""

    numbers: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    window: int

    def tasks(self, most: int) -> int:
        """Returns how many of `most` tasks can share them."""
        return most

    def turns(self, tasks: int) -> Iterator[int]:
        """Yields for each row which task gives it."""
        for number, window in enumerate(self._windows()):
            yield from [number % tasks] * len(window.order)

    def rows(self, source: Drawable, task: int, tasks: int, first: int) -> Iterator[Any]:
        """Yields those of a task, from row `first` of all on."""
        with _pool() as pool:
            yield from source.rows(self._of_task(task, tasks, first), pool)

    def _of_task(self, task: int, tasks: int, first: int) -> Iterator[Window]:
        for number, window in enumerate(self._windows()):
            if number % tasks == task and first < len(window.order):
                yield Window(window.pieces, window.starts, window.stops, window.order[max(0, first) :])
            first -= len(window.order)

    def _windows(self) -> Iterator[Window]:
        rows, size = max(1, self.window // LANES), WINDOW_BYTES // LANES
        return file_windows(self.sizes, self.weights, self.numbers, rows=rows, size=size)
