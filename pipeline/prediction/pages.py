"""Cuts the rows of a source into pages, whose prompts are answered together, and pages into parts, which are files.

Both are cut by number alone, so batches, and with them answers to the last digit, depend on neither workers nor restarts, but
on `evaluation.batch_size`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import ray

from pipeline.evaluation.pages import Slices


def page_lengths(rows_per_part: int, rows_per_page: int) -> list[int]:
    """Returns the lengths of a part's pages."""
    whole, rest = divmod(rows_per_part, rows_per_page)
    return [rows_per_page] * whole + [rest] * bool(rest)


def cut(
    sized_blocks: Iterable[tuple[ray.ObjectRef, int]], lengths: Iterable[int], *, skip: int = 0
) -> Iterator[Slices]:
    """Cuts blocks, given with their numbers of rows, into pages of these `lengths`; the last page has what is left.

    The first `skip` rows belong to no page. Each page is yielded as soon as its last row is there; without further rows,
    further lengths are not used.
    """
    wanted, needed = iter(lengths), skip
    page = Slices([], [])
    dropped = skip > 0
    if not dropped:
        needed = next(wanted)
    for block, size in sized_blocks:
        start = 0
        while start < size:
            taken = min(needed, size - start)
            page.blocks.append(block)
            page.rows.append(list(range(start, start + taken)))
            start, needed = start + taken, needed - taken
            if not needed:
                if not dropped:
                    yield page
                page, dropped, needed = Slices([], []), False, next(wanted)
    if page.blocks and not dropped:
        yield page


def tags(lengths: Sequence[int], first_part: int) -> Iterator[tuple[int, int]]:
    """Yields part and number within it of every page from a part on, without end."""
    return ((part, page) for part in count(first_part) for page in range(len(lengths)))
