"""Pages among the blocks of a dataset."""

import pytest

from pipeline.evaluation.pages import paged, slices

BLOCKS = [("a", 3), ("b", 0), ("c", 4), ("d", 1)]
"""Rows 0 to 2, 3 to 6, and 7."""


def test_the_last_page_holds_what_is_left() -> None:
    assert paged(range(7), 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert paged([], 3) == []


def test_pages_are_found_across_blocks_and_gaps() -> None:
    locations = slices(BLOCKS, [(0, 2, 3), (5,), (6, 7)])
    assert [(s.blocks, s.rows) for s in locations] == [
        (["a", "c"], [[0, 2], [0]]),
        (["c"], [[2]]),
        (["c", "d"], [[3], [0]]),
    ]


def test_a_page_comes_before_the_next_block_is_read() -> None:
    def blocks():
        yield from BLOCKS[:1]
        raise AssertionError("read too far")

    assert next(slices(blocks(), [(1, 2), (4,)])).rows == [[1, 2]]


def test_missing_rows_are_an_error() -> None:
    with pytest.raises(LookupError, match="row 8 of 8"):
        list(slices(BLOCKS, [(7, 8)]))
