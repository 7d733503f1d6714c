"""The rows of one or more tasks as a training worker gets them: a description that can be pickled, and access to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.models.prompts import Encoded
from pipeline.streams.packing import PACKED, unpack_row
from pipeline.streams.streamed_part import StreamedPart, encoded_windows
from pipeline.streams.windows import Window, file_windows, spans, windows_between


@dataclass(frozen=True)
class TrainingRows:
    """Good rows of one or more tasks."""

    count: int
    """How many there are."""
    blocks: tuple[ray.ObjectRef, ...] = ()
    """All of them, encoded, as Arrow tables in Ray's object store; none where rows stream."""
    parts: tuple[StreamedPart, ...] = ()
    """Where rows that stream come from."""

    @property
    def cached(self) -> bool:
        """Whether encoded rows lie in the object store."""
        return bool(self.blocks)

    @property
    def order(self) -> str:
        """What the order depends on in which they are drawn, beside seed and workers; a stage goes on in the same one only."""
        return "cached" if self.cached else f"streamed, {self.parts[0].encoder.data.shuffle_rows} rows"


class CachedRows:
    """Encoded rows drawn from the object store one by one, as views of its memory.

    A tenth of the work of shuffling them through a buffer, which matters where reader and training share few cores.
    """

    def __init__(self, blocks: Sequence[ray.ObjectRef]) -> None:
        self._blocks: list[pa.Table] = [block for block in ray.get(list(blocks)) if len(block)]
        self._ends = np.cumsum([len(block) for block in self._blocks])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Encoded:
        """Returns row `number` in the order of the blocks, wherever their borders are."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        block, start = self._blocks[which], int(self._ends[which]) - len(self._blocks[which])
        return unpack_row(*(block[name][number - start].as_buffer() for name in PACKED))

    def lengths(self) -> np.ndarray:
        """Returns the length of every row in bytes of its tokens (N,)."""
        return np.concatenate([pc.binary_length(block["input_ids"]).to_numpy() for block in self._blocks])


class StreamedRows:
    """Rows that are read and encoded when they are needed, by a pipeline of Ray Data of this worker's own.

    Each worker reads its own pieces: none waits for another, and one may stop whenever it likes.
    """

    def __init__(self, rows: TrainingRows, *, rank: int, workers: int, seed: int) -> None:
        self._parts, self._count = rows.parts, rows.count
        self._rank, self._workers, self._seed = rank, workers, seed
        pieces = [piece for part in rows.parts for piece in part.pieces]
        self._sizes = np.array([piece.good for piece in pieces], dtype=np.int64)
        self._weights = np.array([piece.bytes for piece in pieces], dtype=np.int64)
        self._window = rows.parts[0].encoder.data.shuffle_rows

    def drawn(self, shares: Sequence[int], steps: range) -> Iterator[Encoded]:
        """Yields this rank's rows of `steps` one after the other; `shares` says how many each rank takes a step."""
        span, share = spans(self._count, shares)[self._rank], shares[self._rank]
        first, last = steps.start * share, steps.stop * share
        between = windows_between(self._sizes, self._weights, span, first, last, seed=self._seed, rows=self._window)
        yield from self._encoded(list(between))

    def chosen(self, numbers: np.ndarray) -> Iterator[Encoded]:
        """Yields the rows of these numbers, in rising order, in the order of the files."""
        yield from self._encoded(list(file_windows(self._sizes, numbers)))

    def _encoded(self, windows: list[Window]) -> Iterator[Encoded]:
        return encoded_windows(self._parts, windows, workers=self._workers)
