"""Batches for a training worker: endless epochs from its shard, read ahead in the background, the wait measured.

Rows that lie in Ray's object store are drawn from there one by one, without copies; a tenth of the work of shuffling them
through a buffer, which matters where reader and training share few cores.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.models.prompts import Encoded
from pipeline.streams.packing import PACKED, unpack

AHEAD = 8
"""Batches that are ready before they are asked for; enough to bridge the start of an epoch."""

SHUFFLED = 8
"""Batches among which streamed rows are shuffled."""

NEIGHBOURS = 16
"""Batches whose rows are sorted together where batches are made of rows of similar length."""


class Feed:
    """Yields collated batches epoch after epoch, shuffled by `seed` and the epoch's number.

    `cached`: the shard's rows lie in the object store, and a whole epoch is shuffled; else rows stream, and are shuffled
    among `SHUFFLED` batches. `by_length` makes batches of rows of similar length, from cached rows. `skip` leaves out the
    first batches. `wait_seconds` sums the time for which training stood still for data. Use as a context manager.
    """

    def __init__(
        self,
        shard: Any,
        *,
        batch_size: int,
        collate: Callable[[Sequence[Encoded]], dict[str, Any]],
        seed: int,
        cached: bool,
        by_length: bool = False,
        skip: int = 0,
    ) -> None:
        self.wait_seconds = 0.0
        self._shard = shard
        self._batch_size, self._collate, self._seed = batch_size, collate, seed
        self._cached, self._by_length, self._skip = cached, by_length, skip
        self._ready: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.05)

    def __next__(self) -> dict[str, Any]:
        started = time.monotonic()
        batch = self._ready.get()
        self.wait_seconds += time.monotonic() - started
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def __iter__(self) -> "Feed":
        return self

    def _read(self) -> None:
        try:
            epochs = self._drawn() if self._cached else self._streamed()
            for number, batch in enumerate(epochs):
                if number < self._skip:
                    continue
                self._put(self._collate(unpack(batch)))
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

    def _drawn(self) -> Iterator[dict[str, list[Any]]]:
        """Draws rows from the object store, each once an epoch."""
        blocks = list(self._shard.iter_batches(batch_size=None, batch_format="pyarrow"))
        rows = [(block, i) for block in blocks for i in range(len(block))]
        if len(rows) < self._batch_size:
            raise self._too_few()
        lengths = np.array([block["input_ids"][i].as_buffer().size for block, i in rows])
        epoch = 0
        while True:
            order = np.random.default_rng(self._seed + epoch).permutation(len(rows))
            starts = list(range(0, len(order) - self._batch_size + 1, self._batch_size))
            if self._by_length:
                order = _by_length(order, lengths, self._batch_size * NEIGHBOURS)
                np.random.default_rng([self._seed + epoch, 1]).shuffle(starts)
            for start in starts:
                chosen = [rows[i] for i in order[start : start + self._batch_size]]
                yield {name: [block[name][i].as_buffer() for block, i in chosen] for name in PACKED}
            epoch += 1

    def _streamed(self) -> Iterator[Any]:
        """Reads the shard anew for every epoch."""
        epoch = 0
        while True:
            batches = self._shard.iter_batches(
                batch_size=self._batch_size,
                batch_format="numpy",
                drop_last=True,
                local_shuffle_buffer_size=SHUFFLED * self._batch_size,
                local_shuffle_seed=self._seed + epoch,
            )
            rows = 0
            for batch in batches:
                rows += 1
                yield batch
            if rows == 0:
                raise self._too_few()
            epoch += 1

    def _too_few(self) -> ValueError:
        return ValueError(f"a worker's shard holds fewer rows than its batch of {self._batch_size}")


def _by_length(order: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Sorts a random order by length within each `size` rows: neighbours are alike, and still differ every epoch."""
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
