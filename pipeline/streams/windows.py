"""In which order rows come that stream: pieces of files first, then rows within a window of pieces.

A pure function of seed, epoch, sizes of the pieces, rank and workers, so that a run which goes on skips whole windows
without reading them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW_BYTES = 256 << 20
"""Bytes, as they lie in files, after which a window is closed, whatever its rows: they are held together."""


@dataclass(frozen=True)
class Window:
    """Rows that are read together and handed on in random order."""

    reads: tuple[tuple[int, int, int], ...]
    """Piece, and from which to which of its good rows."""
    order: np.ndarray
    """Places among the rows of all reads, in the order in which they come; not necessarily all."""


@dataclass(frozen=True)
class Span:
    """The part of every epoch that belongs to one worker: rows `start` to `stop` of the shuffled pieces."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def spans(count: int, shares: Sequence[int]) -> list[Span]:
    """Divides the `count` rows of an epoch among workers by how many each takes a step, so that all end it together.

    A worker for which no row is left shares all of them.
    """
    edges = np.concatenate([[0], np.cumsum(shares)]) * count // max(1, sum(shares))
    return [Span(int(a), int(b)) if a < b else Span(0, count) for a, b in zip(edges, edges[1:], strict=False)]


def epoch_windows(
    sizes: np.ndarray, weights: np.ndarray, span: Span, *, seed: int, epoch: int, rows: int
) -> Iterator[Window]:
    """Yields the windows of a worker's part of an epoch.

    `sizes` (P,) are the good rows of the pieces, `weights` (P,) their bytes. A window closes at `rows` rows or
    `WINDOW_BYTES`.
    """
    random = np.random.default_rng([seed, epoch, span.start])
    pieces = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    ends = np.cumsum(sizes[pieces])
    reads: list[tuple[int, int, int]] = []
    count, weight = 0, 0.0
    for piece, end in zip(pieces.tolist(), ends.tolist(), strict=True):
        size = int(sizes[piece])
        start, stop = max(span.start - (end - size), 0), min(span.stop - (end - size), size)
        if start >= stop:
            continue
        if reads and (count + stop - start > rows or weight + weights[piece] > WINDOW_BYTES):
            yield Window(tuple(reads), random.permutation(count))
            reads, count, weight = [], 0, 0.0
        reads.append((piece, start, stop))
        count, weight = count + stop - start, weight + float(weights[piece])
    if reads:
        yield Window(tuple(reads), random.permutation(count))


def windows_between(
    sizes: np.ndarray, weights: np.ndarray, span: Span, first: int, last: int, *, seed: int, rows: int
) -> Iterator[Window]:
    """Yields the windows of rows `first` to `last` of a worker's epochs, one after the other."""
    epoch, place = divmod(first, len(span))
    place = first - place
    while place < last:
        for window in epoch_windows(sizes, weights, span, seed=seed, epoch=epoch, rows=rows):
            begin, end = place, place + len(window.order)
            place = end
            if end > first and begin < last:
                yield Window(window.reads, window.order[max(0, first - begin) : last - begin])
        epoch += 1


def file_windows(sizes: np.ndarray, chosen: np.ndarray | None = None) -> Iterator[Window]:
    """Yields a window for each piece that holds some of the rows `chosen` (in rising order; None: all), in files' order."""
    start = 0
    for piece, size in enumerate(sizes.tolist()):
        if chosen is None:
            order = np.arange(size)
        else:
            low, high = np.searchsorted(chosen, [start, start + size])
            order = chosen[low:high] - start
        if len(order):
            yield Window(((piece, 0, size),), order)
        start += size
