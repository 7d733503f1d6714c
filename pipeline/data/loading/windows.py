"""Order of streamed rows: pieces of files are shuffled first, then rows within windows of pieces.

A worker's share of an epoch is divided among lanes that take turns row by row. So consecutive rows come from at least sixteen
pieces, and several tasks can read lanes in parallel.

The order is a pure function of seed, epoch, sizes of the pieces, rank and workers. Windows are computed one by one, and a
resumed run begins with the window it needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

LANES = 16
"""Lanes of a worker, and pieces whose rows are shuffled together."""

WINDOW_BYTES = 256 << 20
"""Compressed bytes of the windows of all lanes together, which are in memory at the same time."""


@dataclass(frozen=True)
class Window:
    """Rows that are read together and yielded in random order."""

    pieces: np.ndarray
    """Pieces to read (K,)."""
    starts: np.ndarray
    """First good row of each (K,)."""
    stops: np.ndarray
    """Last good row of each, exclusive (K,)."""
    order: np.ndarray
    """Indices among the rows read, in the order in which they are yielded; not necessarily all."""


@dataclass(frozen=True)
class Span:
    """The part of every epoch that belongs to one worker: rows `start` to `stop` of the shuffled pieces."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def spans(count: int, shares: Sequence[int]) -> list[Span]:
    """Divides the `count` rows of an epoch among workers in proportion to their rows per step, so that all end it together.

    A worker for which no row is left gets all of them.
    """
    edges = np.concatenate([[0], np.cumsum(shares)]) * count // max(1, sum(shares))
    return [Span(int(a), int(b)) if a < b else Span(0, count) for a, b in zip(edges, edges[1:], strict=False)]


def lanes(span: Span, rows: int) -> list[Span]:
    """Divides a worker's share of an epoch among lanes; its row number r is the next row of lane r % len(lanes).

    Fewer rows than `rows`, which are shuffled together, are a single lane.
    """
    count = LANES if len(span) >= rows else 1
    lengths = [-(-(len(span) - lane) // count) for lane in range(count)]
    edges = [span.start, *(span.start + np.cumsum(lengths)).tolist()]
    return [Span(a, b) for a, b in pairwise(edges)]


def lane_windows(
    sizes: np.ndarray, weights: np.ndarray, lane: Span, *, seed: int, epoch: int, rows: int, size: int, first: int = 0
) -> Iterator[Window]:
    """Yields the windows of a lane in an epoch, from the lane's row `first` on.

    `sizes` (P,) are the good rows of the pieces, `weights` (P,) their bytes. The piece that brings a window to `rows` rows or
    `size` bytes is its last.
    """
    pieces = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    ends = np.cumsum(sizes[pieces])
    begin, end = np.searchsorted(ends, lane.start, "right"), np.searchsorted(ends, lane.stop, "left") + 1
    pieces, ends = pieces[begin:end], ends[begin:end]
    starts = np.maximum(lane.start - ends + sizes[pieces], 0)
    stops = np.minimum(lane.stop - ends, 0) + sizes[pieces]
    nonempty = np.flatnonzero(starts < stops)
    pieces, starts, stops = pieces[nonempty], starts[nonempty], stops[nonempty]
    edges = _edges(stops - starts, weights[pieces], rows, size)
    offsets = np.concatenate([[0], np.cumsum(stops - starts)])[edges]
    for window in range(int(np.searchsorted(offsets, first, "right")) - 1, len(edges) - 1):
        part = slice(edges[window], edges[window + 1])
        count = int(offsets[window + 1] - offsets[window])
        order = np.random.default_rng([seed, epoch, lane.start, window]).permutation(count)
        yield Window(pieces[part], starts[part], stops[part], order[max(0, first - int(offsets[window])) :])


def file_windows(
    sizes: np.ndarray, weights: np.ndarray, chosen: np.ndarray, *, rows: int, size: int
) -> Iterator[Window]:
    """Yields windows of the good rows `chosen` (their numbers, in rising order), in the order of the files."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    pieces = np.unique(np.searchsorted(ends, chosen, "right"))
    for a, b in pairwise(_edges(sizes[pieces], weights[pieces], rows, size).tolist()):
        part = pieces[a:b]
        low, high = np.searchsorted(chosen, [begins[part[0]], ends[part[-1]]])
        which = np.searchsorted(ends[part], chosen[low:high], "right")
        shift = np.cumsum(sizes[part]) - ends[part]  # from the number of a good row to its place among those read
        yield Window(part, np.zeros_like(part), sizes[part], chosen[low:high] + shift[which])


def _edges(sizes: np.ndarray, weights: np.ndarray, rows: int, size: int) -> np.ndarray:
    """Returns the first piece of each window, and the end of the last one (W + 1,)."""
    cost = np.maximum(sizes * size, weights * rows)  # of a window: rows * size
    window = (np.cumsum(cost) - cost) // (rows * size)
    return np.concatenate([np.flatnonzero(np.diff(window, prepend=-1)), [len(sizes)]])
