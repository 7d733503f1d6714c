"""Rows of several tasks as one: all of one task's and a share of the others', cached ones by number."""

from typing import Any

import numpy as np
import pytest

from pipeline.data.errors import StreamError
from pipeline.data.loading.training_rows import TrainingRows, mixture


def cached(count: int, *blocks: Any) -> TrainingRows:
    return TrainingRows(count, blocks)


def test_a_share_of_each_task_is_chosen_and_numbers_go_on_over_the_blocks() -> None:
    mixed = mixture([(cached(100, "a", "b"), 0.05), (cached(40, "c"), 0.05), (cached(30, "d"), 1.0)], seed=3)
    assert mixed.blocks == ("a", "b", "c", "d")
    assert mixed.count == len(mixed.chosen) == 5 + 2 + 30
    assert (np.diff(mixed.chosen) > 0).all(), "rising, none twice"
    by_task = np.histogram(mixed.chosen, [0, 100, 140, 170])[0]
    assert by_task.tolist() == [5, 2, 30]


def test_the_seed_decides_which() -> None:
    parts = [(cached(1000, "a"), 0.05), (cached(10, "b"), 1.0)]
    one, same, other = (mixture(parts, seed).chosen for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_the_smallest_share_is_a_row() -> None:
    assert mixture([(cached(3, "a"), 0.05), (cached(3, "b"), 1.0)], 0).count == 4


def test_cached_and_streamed_rows_do_not_mix() -> None:
    with pytest.raises(StreamError, match=r"data\.cache"):
        mixture([(cached(3, "a"), 0.5), (TrainingRows(3), 1.0)], 0)
