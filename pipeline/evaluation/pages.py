"""Pages: prompts that are always answered together, and the location of their rows in a dataset's blocks.

Rounding differs between batch shapes and can change an answer where two tokens are almost equally likely. So prompts are
answered in batches that depend only on their task: a page holds consecutive rows of its files, whatever is requested or
stored. Rows stay in Ray's object store; only their locations pass through the driver.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class Slices:
    """Location of the rows of a page."""

    blocks: list[ray.ObjectRef]
    """Arrow tables in the object store."""
    rows: list[list[int]]
    """Row numbers per block."""


def paged(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Returns rows in pages of `size`, the last one with what is left."""
    return [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]


def blocks(rows: ray.data.Dataset) -> Iterator[tuple[ray.ObjectRef, int]]:
    """Yields the blocks of a dataset and their numbers of rows, in order, as they are computed."""
    for bundle in rows.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref, entry.metadata.num_rows


def slices(sized_blocks: Iterable[tuple[ray.ObjectRef, int]], pages: Iterable[Sequence[int]]) -> Iterator[Slices]:
    """Yields the location of each page; pages hold numbers of rows over all blocks, rising over all pages.

    Each page is yielded as soon as its last row is there. Raises LookupError where rows are missing.
    """
    blocks_left, block, start, stop = iter(sized_blocks), None, 0, 0
    for page in pages:
        location = Slices([], [])
        for row in page:
            while row >= stop:
                block, count = next(blocks_left, (None, 0))
                if block is None:
                    raise LookupError(f"row {row} of {stop}")
                start, stop = stop, stop + count
            if not location.blocks or location.blocks[-1] is not block:
                location.blocks.append(block)
                location.rows.append([])
            location.rows[-1].append(row - start)
        yield location
