"""The rows of one or more tasks as a training worker gets them: a description that can be pickled, and access to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline.models.prompts import Encoded
from pipeline.streams.packing import PACKED, unpack_row


@dataclass(frozen=True)
class TrainingRows:
    """Good rows of one or more tasks."""

    count: int
    """How many there are."""
    blocks: tuple[ray.ObjectRef, ...]
    """All of them, encoded, as Arrow tables in Ray's object store."""

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


def joined(parts: Sequence[TrainingRows]) -> TrainingRows:
    """Returns the rows of several tasks together."""
    return TrainingRows(sum(part.count for part in parts), tuple(block for part in parts for block in part.blocks))
