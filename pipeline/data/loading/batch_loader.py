"""Batches for a training worker, read ahead in the background; the time spent waiting is measured.

All epochs are one long sequence of rows, each epoch shuffled by seed and its number; optimizer step s takes the next
`batch_size` of it, across epochs too. So no row is left out for good, and a stage draws `steps * batch_size` rows. With
cached rows a step holds the same rows for any number of workers and any micro-batch size. With streamed rows each worker
draws from its own share.
"""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from pipeline.data.loading.training_rows import CachedRows, StreamedRows, TrainingRows
from pipeline.data.loading.windows import spans
from pipeline.models.encoding import IGNORED, Encoded

AHEAD = 8
"""Micro-batches that are prepared ahead."""

PATIENCE = 2.0
"""Seconds that leaving waits for the reader thread, which may be busy with a batch."""

NEIGHBOURS = 16
"""Steps whose rows are sorted together when rows are grouped by length."""

Collate = Callable[[Sequence[Encoded]], dict[str, Any]]


@dataclass(frozen=True)
class StepLayout:
    """How the rows of an optimizer step are dealt over workers and their micro-batches."""

    batch_size: int
    """Rows of a step, over all workers."""
    workers: int
    micro_batch: int
    """Most rows per forward pass of a worker."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of each worker in a step."""
        return -(-self.batch_size // (self.workers * self.micro_batch))

    def share(self, rank: int) -> list[range]:
        """Returns for each micro-batch of a worker which positions (0 to batch_size - 1) of the step's rows it holds.

        Sizes differ by at most 1; a micro-batch may be empty.
        """
        slots = self.workers * self.accumulation
        edges = [-(-self.batch_size * slot // slots) for slot in range(slots + 1)]
        slots_of_rank = range(rank * self.accumulation, (rank + 1) * self.accumulation)
        return [range(edges[slot], edges[slot + 1]) for slot in slots_of_rank]


class BatchLoader:
    """Yields for each of `steps` the list of this rank's collated micro-batches, `layout.accumulation` of them.

    An empty micro-batch gets one row whose labels are all IGNORED, so that all ranks compute alike. Starting at
    `steps.start` yields what a run from step 0 would yield there. With `group_by_length` a step's rows have similar
    lengths. `wait_seconds` sums the time for which training waited for data. Use as a context manager; leaving it waits
    for no row and ends the tasks that read ahead.
    """

    def __init__(
        self,
        rows: TrainingRows,
        *,
        layout: StepLayout,
        rank: int,
        steps: range,
        seed: int,
        collate: Collate,
        group_by_length: bool = False,
    ) -> None:
        self.wait_seconds = 0.0
        self._rows, self._layout, self._rank, self._steps = rows, layout, rank, steps
        self._seed, self._collate, self._group = seed, collate, group_by_length
        self._shares = [sum(map(len, layout.share(rank))) for rank in range(layout.workers)]
        self._next = steps.start
        self._ready: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="batch loader", daemon=True)

    def __enter__(self) -> "BatchLoader":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self.ended(PATIENCE)

    def ended(self, seconds: float) -> bool:
        """Waits up to `seconds` for the reader thread; returns whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def new_rows(self, most: int) -> list[int]:
        """Returns how many rows of each micro-batch of the last step are new: of the first `most` distinct ones of all ranks.

        New rows come first in a micro-batch. Their total is the same for any number of workers; with cached rows they are
        the same rows.
        """
        step, shares = self._next - 1, self._layout.share(self._rank)
        if self._rows.cached:
            start, end = step * self._layout.batch_size + shares[0].start, min(most, self._rows.count)
        else:
            span = spans(self._rows.count, self._shares)[self._rank]
            before, share = sum(self._shares[: self._rank]), self._shares[self._rank]
            part = most * (before + share) // self._layout.batch_size - most * before // self._layout.batch_size
            start, end = step * share, min(part, len(span))
        counts = []
        for positions in shares:
            counts.append(min(max(0, end - start), len(positions)))
            start += len(positions)
        return counts

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> list[dict[str, Any]]:
        if self._next >= self._steps.stop:
            raise StopIteration
        started = time.monotonic()
        batches = []
        for _ in range(self._layout.accumulation):
            batch = self._ready.get()
            if isinstance(batch, BaseException):
                raise batch
            batches.append(batch)
        self.wait_seconds += time.monotonic() - started
        self._next += 1
        return batches

    def _read(self) -> None:
        try:
            with closing(self._drawn()) as drawn:
                for rows in drawn:
                    self._put(self._collate(rows))
                    if self._stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: dict[str, Any] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _drawn(self) -> Generator[list[Encoded]]:
        """Yields the rows of this rank's micro-batches."""
        yield from self._cached() if self._rows.cached else self._streamed()

    def _cached(self) -> Iterator[list[Encoded]]:
        rows = CachedRows(self._rows)
        size = self._layout.batch_size
        lengths = rows.lengths() if self._group else None

        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return epoch_order(len(rows), epoch, seed=self._seed, step=size, lengths=lengths)

        def row(position: int) -> Encoded:
            epoch, number = divmod(position, len(rows))
            return rows[order(epoch)[number]]

        share = self._layout.share(self._rank)
        for step in self._steps:
            for positions in share:
                yield [row(step * size + position) for position in positions] or [unlabelled(row(step * size))]

    def _streamed(self) -> Iterator[list[Encoded]]:
        layout = self._layout
        source = StreamedRows(
            self._rows, rank=self._rank, workers=layout.workers, seed=self._seed, left=self._stop.is_set
        )
        last: Encoded | None = None
        with closing(source.drawn(self._shares, self._steps)) as rows:
            for _ in self._steps:
                for positions in layout.share(self._rank):
                    part = list(islice(rows, len(positions)))
                    if not part and last is None:
                        last = next(source.chosen(np.array([0])))
                    last = part[-1] if part else last
                    assert last is not None
                    yield part or [unlabelled(last)]


def unlabelled(row: Encoded) -> Encoded:
    """Returns a row without labels."""
    return replace(row, labels=np.full_like(row.labels, IGNORED))


def epoch_order(count: int, epoch: int, *, seed: int, step: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Returns the order of `count` rows in an epoch.

    With `lengths` (N,) rows of a step have similar lengths: a random order is sorted by length within groups of `NEIGHBOURS`
    steps, then the steps are shuffled. Steps that cross an epoch's border are left as they are.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    if lengths is None:
        return order
    begin = -epoch * count % step
    end = begin + max(0, count - begin) // step * step
    inner = order[begin:end]
    for start in range(0, len(inner), step * NEIGHBOURS):
        part = inner[start : start + step * NEIGHBOURS]
        part[:] = part[np.argsort(lengths[part], kind="stable")]
    order[begin:end] = random.permutation(inner.reshape(-1, step)).reshape(-1)
    return order


def distinct_batches(
    rows: TrainingRows, *, count: int, micro_batch: int, rank: int, workers: int, seed: int
) -> Iterator[list[Encoded] | None]:
    """Yields up to `count` distinct random rows in batches, divided among the ranks.

    Every rank gets equally many batches; a rank that has run out of rows gets None.
    """
    chosen = np.random.default_rng([seed]).permutation(rows.count)[:count]
    shares = np.array_split(np.sort(chosen), workers)  # the first is the largest
    numbers, batches = shares[rank], -(-len(shares[0]) // micro_batch)
    if rows.cached:
        blocks = CachedRows(rows)
        encoded: Iterator[Encoded] = (blocks[number] for number in numbers)
    else:
        encoded = StreamedRows(rows, rank=rank, workers=workers, seed=seed).chosen(numbers)
    for _ in range(batches):
        yield list(islice(encoded, micro_batch)) or None
