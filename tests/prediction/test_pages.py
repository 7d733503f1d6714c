"""Pages of fixed length among blocks of any."""

from itertools import cycle, islice

from pipeline.prediction.pages import cut, page_lengths, tags

BLOCKS = [("a", 3), ("b", 0), ("c", 4), ("d", 1)]


def test_a_part_ends_with_a_shorter_page() -> None:
    assert page_lengths(10, 4) == [4, 4, 2]
    assert page_lengths(8, 4) == [4, 4]
    assert page_lengths(3, 64) == [3]


def test_pages_do_not_depend_on_blocks() -> None:
    whole = [(page.blocks, page.rows) for page in cut(BLOCKS, cycle([3, 2]))]
    assert whole == [(["a"], [[0, 1, 2]]), (["c"], [[0, 1]]), (["c", "d"], [[2, 3], [0]])]
    assert [sum(map(len, page.rows)) for page in cut([("a", 8)], cycle([3, 2]))] == [3, 2, 3]


def test_rows_before_the_first_page_are_skipped() -> None:
    assert [(p.blocks, p.rows) for p in cut(BLOCKS, cycle([5]), skip=3)] == [(["c", "d"], [[0, 1, 2, 3], [0]])]
    assert list(cut(BLOCKS, cycle([5]), skip=8)) == []
    assert list(cut([], cycle([5]), skip=1)) == []


def test_pages_are_numbered_within_their_part() -> None:
    assert list(islice(tags([4, 2], 3), 3)) == [(3, 0), (3, 1), (4, 0)]
