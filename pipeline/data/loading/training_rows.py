"""Training rows of one or more tasks: a picklable description, and readers for cached and streamed rows."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.data.encoded.packing import PACKED, unpack_row
from pipeline.data.errors import StreamError
from pipeline.data.loading.drawing import Chosen, Drawable, Drawn, Order
from pipeline.data.loading.read_ahead import ReadAhead
from pipeline.data.loading.streamed_part import StreamedPart
from pipeline.data.loading.windows import spans
from pipeline.models.encoding import Encoded


@dataclass(frozen=True)
class TrainingRows:
    """Good rows of one or more tasks."""

    count: int
    """Number of rows."""
    blocks: tuple[ray.ObjectRef, ...] = ()
    """Encoded rows as Arrow tables in Ray's object store; empty where rows are streamed."""
    parts: tuple[StreamedPart, ...] = ()
    """Sources of streamed rows."""
    chosen: np.ndarray | None = None
    """Rising indices of the selected rows (N,); None: all."""

    @property
    def cached(self) -> bool:
        """Whether encoded rows lie in the object store."""
        return bool(self.blocks)

    def split(self, share: float, seed: int) -> tuple["TrainingRows", "TrainingRows"]:
        """Returns the rows of one task without a random share of them, and that share: `held_out` rows."""
        number = held_out(self.count, share)
        held_numbers = np.sort(np.random.default_rng([seed, self.count]).permutation(self.count)[:number])
        learned = replace(self, count=self.count - number)
        if self.cached:
            learned = replace(learned, chosen=np.delete(np.arange(self.count), held_numbers))
        else:
            (part,) = self.parts
            bad = part.pieces.bad
            held_positions = np.delete(np.arange(int(part.pieces.rows.sum())), bad)[held_numbers]
            learned = replace(learned, parts=(part.without(np.union1d(bad, held_positions)),))
        return learned, replace(self, count=number, chosen=held_numbers)


def mixture(parts: Sequence[tuple[TrainingRows, float]], seed: int) -> TrainingRows:
    """Returns the rows of several tasks as one: of each a random share, from 0 (exclusive: one row at least) to 1.

    Raises StreamError where some are cached and others streamed: workers read either.
    """
    cached = {rows.cached for rows, _ in parts}
    if len(cached) > 1:
        raise StreamError(
            "rows that are mixed must all be cached, or all be streamed; set data.cache to memory or to none"
        )
    chosen = [_some(rows.count, share, seed) for rows, share in parts]
    count = sum(map(len, chosen))
    if cached == {True}:
        starts = np.cumsum([0, *(rows.count for rows, _ in parts)])
        numbers = np.concatenate([start + some for start, some in zip(starts, chosen, strict=False)])
        return TrainingRows(count, tuple(block for rows, _ in parts for block in rows.blocks), chosen=numbers)
    streamed = []
    for (rows, _), some in zip(parts, chosen, strict=True):
        (part,) = rows.parts
        good = np.delete(np.arange(int(part.pieces.rows.sum())), part.pieces.bad)
        streamed.append(part.without(np.union1d(part.pieces.bad, np.delete(good, some))))
    return TrainingRows(count, parts=tuple(streamed))


def _some(count: int, share: float, seed: int) -> np.ndarray:
    """Returns rising numbers of a random share of `count` rows, at least one."""
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[: max(1, round(share * count))])


MOST_HELD_OUT = 2048
"""Most held-out rows: enough to compare adapters by their loss."""


def held_out(count: int, share: float) -> int:
    """Returns how many of `count` rows are held out: a share of them, one at least."""
    return min(MOST_HELD_OUT, max(1, round(share * count)))


class CachedRows:
    """Encoded rows drawn from the object store one by one, as views of its memory.

    Costs a tenth of a shuffle buffer, which matters where reader and training share few cores.
    """

    def __init__(self, rows: TrainingRows) -> None:
        self._blocks: list[pa.Table] = [block for block in ray.get(list(rows.blocks)) if len(block)]
        self._ends = np.cumsum([len(block) for block in self._blocks])
        self._chosen = rows.chosen

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Encoded:
        """Returns row `number` in the order of the blocks, wherever their borders are."""
        if self._chosen is not None:
            number = int(self._chosen[number])
        which = int(np.searchsorted(self._ends, number, side="right"))
        block, start = self._blocks[which], int(self._ends[which]) - len(self._blocks[which])
        return unpack_row(*(block[name][number - start].as_buffer() for name in PACKED))

    def lengths(self) -> np.ndarray:
        """Returns the length of every row in bytes of its tokens (N,)."""
        lengths = np.concatenate([pc.binary_length(block["input_ids"]).to_numpy() for block in self._blocks])
        return lengths if self._chosen is None else lengths[self._chosen]


class StreamedRows:
    """Rows that this worker's own tasks read and encode when they are needed.

    Each worker reads its own pieces and waits for no other. `left` returns true once the worker has stopped reading.
    """

    def __init__(
        self, rows: TrainingRows, *, rank: int, workers: int, seed: int, left: Callable[[], bool] = lambda: False
    ) -> None:
        self._source, self._count, self._chosen = Drawable(rows.parts), rows.count, rows.chosen
        self._rank, self._workers, self._seed, self._left = rank, workers, seed, left

    def drawn(self, shares: Sequence[int], steps: range) -> Generator[Encoded]:
        """Yields this rank's rows of `steps`; `shares` are the rows of each rank per step."""
        span, share = spans(self._count, shares)[self._rank], shares[self._rank]
        return self._encoded(Drawn(span, steps.start * share, steps.stop * share, self._seed, self._source.window))

    def chosen(self, numbers: np.ndarray) -> Generator[Encoded]:
        """Yields the rows with these rising numbers, in the order of the files."""
        numbers = numbers if self._chosen is None else self._chosen[numbers]
        return self._encoded(Chosen(numbers, self._source.sizes, self._source.weights, self._source.window))

    def _encoded(self, order: Order) -> Generator[Encoded]:
        tasks = max(1, self._source.parts[0].origin.encoder.data.num_readers // self._workers)
        with ReadAhead(self._source, order, tasks=tasks, left=self._left) as rows:
            yield from rows
