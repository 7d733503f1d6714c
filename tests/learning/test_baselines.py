"""Baselines over several seeds."""

from statistics import fmean, stdev
from typing import Any

import pytest

from pipeline.learning.baselines import over_seeds


def result(new: float, abilities: float | None) -> dict[str, Any]:
    columns = {"digits": new}
    return {"new": new, "base_abilities": abilities, "samples": 64, "seconds": 10 * new, "columns": columns,
            "columns_by_row": columns}  # fmt: skip


def test_one_seed_is_what_it_is() -> None:
    assert over_seeds([result(0.5, 0.25)], 7) == result(0.5, 0.25)


def test_several_seeds_are_mean_and_spread() -> None:
    new, abilities = (0.2, 0.5, 0.9), (0.1, 0.1, 0.4)
    actual = over_seeds([result(*pair) for pair in zip(new, abilities, strict=True)], 7)
    assert actual["new"] == pytest.approx(fmean(new))
    assert actual["columns"] == actual["columns_by_row"] == {"digits": pytest.approx(fmean(new))}
    assert actual["spread"] == {"new": pytest.approx(stdev(new)), "base_abilities": pytest.approx(stdev(abilities))}
    assert actual["by_seed"]["9"] == {"new": 0.9, "base_abilities": 0.4}
    assert (actual["samples"], actual["seconds"]) == (64, pytest.approx(10 * fmean(new)))


def test_a_stream_without_benchmarks_has_no_base_abilities() -> None:
    actual = over_seeds([result(0.2, None), result(0.4, None)], 0)
    assert actual["base_abilities"] is None
    assert actual["spread"].keys() == actual["by_seed"]["1"].keys() == {"new"}
