"""The accuracy matrix and its metrics, against numbers worked out by hand."""

import json

import numpy as np
import pytest

from pipeline.evaluation.matrix import (
    FORMULAS,
    AccuracyMatrix,
    average_accuracy,
    backward_transfer,
    base_retention,
    continual_metrics,
    forgetting,
)


@pytest.fixture
def matrix() -> AccuracyMatrix:
    matrix = AccuracyMatrix(["a", "b", "c"], ["f", "g"])
    matrix.record("base", {"a": 0.1, "b": 0.95, "c": 0.3, "f": 0.8, "g": 0.4})
    matrix.record("a", {"a": 0.9, "f": 0.8, "g": 0.4})
    matrix.record("b", {"a": 0.7, "b": 0.8, "f": 0.7, "g": 0.4})
    matrix.record("c", {"a": 0.6, "b": 0.9, "c": 1.0, "f": 0.6, "g": 0.3})
    return matrix


def test_metrics_by_hand(matrix: AccuracyMatrix) -> None:
    assert average_accuracy(matrix) == pytest.approx((0.6 + 0.9 + 1.0) / 3)
    assert backward_transfer(matrix) == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)  # the base's 0.95 on b does not count
    assert base_retention(matrix) == pytest.approx(0.9 / 1.2)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_an_independent_implementation(seed: int) -> None:
    """The matrices R of Lopez-Paz and Ranzato and a of Chaudhry et al., in numpy."""
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 8))
    tasks, abilities = [f"t{i}" for i in range(count)], ["f", "g"]
    base, after_TT = random.random(count + 2), random.random((count, count))
    kept = random.random(2)
    matrix = AccuracyMatrix(tasks, abilities)
    matrix.record("base", dict(zip([*tasks, *abilities], base, strict=True)))
    for i, task in enumerate(tasks):
        matrix.record(task, dict(zip(tasks, after_TT[i], strict=True)))
    matrix.record(tasks[-1], dict(zip(abilities, kept, strict=True)))
    assert average_accuracy(matrix) == pytest.approx(after_TT[-1].mean())
    assert backward_transfer(matrix) == pytest.approx((after_TT[-1, :-1] - np.diag(after_TT)[:-1]).mean())
    assert forgetting(matrix) == pytest.approx((after_TT[:-1, :-1].max(0) - after_TT[-1, :-1]).mean())
    assert base_retention(matrix) == pytest.approx(kept.sum() / base[-2:].sum())


def test_forgetting_measures_against_the_best_earlier_row_and_transfer_against_the_own_row(
    matrix: AccuracyMatrix,
) -> None:
    matrix.record("b", {"a": 0.95})
    assert forgetting(matrix) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.9)) / 2)
    assert backward_transfer(matrix) == pytest.approx(-0.1)


def test_one_task_and_no_benchmarks() -> None:
    matrix = AccuracyMatrix(["a"])
    assert (average_accuracy(matrix), backward_transfer(matrix), forgetting(matrix)) == (None, 0.0, 0.0)
    matrix.record("base", {"a": 0.1})
    assert average_accuracy(matrix) is None
    matrix.record("a", {"a": 0.9})
    assert continual_metrics(matrix) == {"average_accuracy": 0.9, "backward_transfer": 0.0, "forgetting": 0.0}


def test_an_unfinished_stream_is_measured_at_its_last_row(matrix: AccuracyMatrix) -> None:
    partial = AccuracyMatrix(matrix.tasks, matrix.benchmarks)
    for row in ("base", "a", "b"):
        partial.record(row, {c: v for c in matrix.columns if (v := matrix.value(row, c)) is not None})
    assert partial.last == 2
    assert average_accuracy(partial) == pytest.approx((0.7 + 0.8) / 2)
    assert backward_transfer(partial) == forgetting(partial) * -1 == pytest.approx(-0.2)


def test_gaps_are_skipped() -> None:
    matrix = AccuracyMatrix(["a", "b", "c"], ["f"])
    matrix.record("a", {"a": 0.9})
    matrix.record("c", {"b": 0.5, "c": 0.7, "f": 0.5})
    assert average_accuracy(matrix) == pytest.approx(0.6)
    assert backward_transfer(matrix) == 0.0
    assert forgetting(matrix) == 0.0
    assert base_retention(matrix) is None


def test_retention_is_undefined_where_the_base_knew_nothing() -> None:
    matrix = AccuracyMatrix(["a"], ["f"])
    matrix.record("base", {"f": 0.0})
    matrix.record("a", {"a": 1.0, "f": 0.2})
    assert base_retention(matrix) is None


def test_json_round_trip(matrix: AccuracyMatrix) -> None:
    plain = json.loads(json.dumps(matrix.to_json(), allow_nan=False))
    assert plain["rows"] == ["base", "a", "b", "c"]
    assert plain["columns"] == ["a", "b", "c", "f", "g"]
    assert plain["values"][1] == [0.9, None, None, 0.8, 0.4]
    again = AccuracyMatrix.from_json(plain)
    assert again.to_json() == plain
    assert continual_metrics(again) == continual_metrics(matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ["base", "b", "a", "c"]}, "rows must be base"),
        ({"values": [[0.0] * 5]}, "4 rows need"),
        ({"values": [[0.0] * 4] * 4}, "row 'base' has 4 values, 5 needed"),
        ({"values": [[1.5] * 5] * 4}, "fraction in"),
    ],
)
def test_json_that_does_not_fit_is_refused(matrix: AccuracyMatrix, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix.from_json(matrix.to_json() | change)


def test_json_without_a_part_is_refused(matrix: AccuracyMatrix) -> None:
    plain = matrix.to_json()
    del plain["benchmarks"]
    with pytest.raises(ValueError, match="missing benchmarks"):
        AccuracyMatrix.from_json(plain)


def test_mistakes_are_named(matrix: AccuracyMatrix) -> None:
    with pytest.raises(ValueError, match="no row 'z'; rows: base, a, b, c"):
        matrix.record("z", {"a": 0.5})
    with pytest.raises(ValueError, match="no column 'z'"):
        matrix.value("a", "z")
    with pytest.raises(ValueError, match="twice: a"):
        AccuracyMatrix(["a"], ["a"])
    with pytest.raises(ValueError, match="twice: base"):
        AccuracyMatrix(["base"])


def test_every_metric_has_its_formula(matrix: AccuracyMatrix) -> None:
    assert set(continual_metrics(matrix)) | {"routing_accuracy"} == set(FORMULAS)
