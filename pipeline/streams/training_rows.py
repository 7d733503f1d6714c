"""The rows of one or more tasks as a training worker gets them: a description that can be pickled, and access to it."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.models.prompts import Encoded
from pipeline.streams.drawing import Chosen, Drawable, Drawn, Order
from pipeline.streams.packing import PACKED, unpack_row
from pipeline.streams.read_ahead import ReadAhead
from pipeline.streams.streamed_part import StreamedPart
from pipeline.streams.windows import spans


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
    """Rows that are read and encoded when they are needed, by tasks of this worker's own.

    Each worker reads its own pieces: none waits for another, and one may stop whenever it likes: `left` says that it has.
    """

    def __init__(
        self, rows: TrainingRows, *, rank: int, workers: int, seed: int, left: Callable[[], bool] = lambda: False
    ) -> None:
        self._source, self._count = Drawable(rows.parts), rows.count
        self._rank, self._workers, self._seed, self._left = rank, workers, seed, left

    def drawn(self, shares: Sequence[int], steps: range) -> Generator[Encoded]:
        """Yields this rank's rows of `steps` one after the other; `shares` says how many each rank takes a step."""
        span, share = spans(self._count, shares)[self._rank], shares[self._rank]
        return self._encoded(Drawn(span, steps.start * share, steps.stop * share, self._seed, self._source.window))

    def chosen(self, numbers: np.ndarray) -> Generator[Encoded]:
        """Yields the rows of these numbers, in rising order, in the order of the files."""
        return self._encoded(Chosen(numbers, self._source.sizes, self._source.weights, self._source.window))

    def _encoded(self, order: Order) -> Generator[Encoded]:
        tasks = max(1, self._source.parts[0].origin.encoder.data.readers // self._workers)
        with ReadAhead(self._source, order, tasks=tasks, left=self._left) as rows:
            yield from rows
