"""Calibration of posteriors against its formula."""

import json

import numpy as np
import pytest

from pipeline.evaluation.calibration import BINS, Calibration, calibration_of_run
from pipeline.evaluation.choices import calibrations, choices, ranking
from pipeline.evaluation.results import Evaluation, TaskResult
from pipeline.routing.call import Routers
from tests.helpers import claimed_prompts, statistics_features


def by_formula(posterior_N: np.ndarray, right_N: np.ndarray) -> float:
    """Guo et al. 2017, equation 5, in plain loops: bins ((m - 1) / 15, m / 15]."""
    error = 0.0
    for m in range(1, BINS + 1):
        inside = [i for i, p in enumerate(posterior_N) if (m - 1) / BINS < p <= m / BINS]
        if inside:
            accuracy = sum(right_N[i] for i in inside) / len(inside)
            confidence = sum(posterior_N[i] for i in inside) / len(inside)
            error += len(inside) / len(posterior_N) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("count", [1, 7, 100, 5000])
def test_error_is_that_of_the_formula(count):
    noise = np.random.default_rng(count)
    posterior_N = noise.random(count) ** 0.3
    right_N = noise.random(count) < 0.8
    actual = Calibration.of(posterior_N, right_N)
    assert actual.error == pytest.approx(by_formula(posterior_N, right_N), abs=1e-12)
    assert sum(actual.counts) == count
    assert sum(actual.right) == right_N.sum()


def test_parts_add_up():
    noise = np.random.default_rng(0)
    posterior_N, right_N = noise.random(90), noise.random(90) < 0.5
    parts = [Calibration.of(p, r) for p, r in zip(np.split(posterior_N, 3), np.split(right_N, 3), strict=True)]
    actual, expected = Calibration.sum(parts), Calibration.of(posterior_N, right_N)
    assert (actual.counts, actual.right) == (expected.counts, expected.right)
    assert actual.error == pytest.approx(expected.error)
    assert Calibration.from_json(json.loads(json.dumps(actual.to_json()))) == actual


def test_sure_and_right_is_without_error():
    assert Calibration.of(np.ones(9), np.ones(9, bool)).error == 0
    assert Calibration.of(np.ones(9), np.zeros(9, bool)).error == 1
    assert Calibration.of(np.zeros(0), np.zeros(0, bool)).error == 0


def test_a_posterior_is_explained_by_those_like_it():
    known = Calibration.of(np.array([1.0, 0.99, 0.95, 0.5]), np.array([True, True, False, True]))
    assert known.explain(0.97) == "66.7% right of 3 evaluated prompts with a posterior of 93% to 100%"
    assert known.explain(0.1) == "no evaluated prompt had a posterior of 7% to 13%"
    assert known.explain(1.0).startswith("66.7% right")
    assert known.explain(0.0).startswith("no evaluated prompt")


def test_wrong_sides_of_the_base_are_counted_by_task():
    sure = Calibration.of(np.ones(10), np.ones(10, bool))
    results = {
        "clock": TaskResult(0.9, None, {"clock": 7, "digits": 1, "base": 2}, calibration=sure),
        "digits": TaskResult(0.9, None, {"digits": 10}, calibration=sure),
        "shape": TaskResult(0.9, None, {"base": 9, "clock": 1}, calibration=sure),
    }
    actual = Evaluation(results).calibration(["clock", "digits"])
    assert actual["columns"]["clock"] == {"prompts": 10, "error": 0, "false_rejects": 0.2, "false_accepts": None}
    assert actual["columns"]["shape"]["false_accepts"] == pytest.approx(0.1)
    assert actual["false_rejects"] == pytest.approx(0.1)
    assert actual["false_accepts"] == pytest.approx(0.1)
    assert sum(actual["bins"]["counts"]) == 30
    again = Evaluation.from_json(json.loads(json.dumps(Evaluation(results).to_json())))
    assert again.calibration(["clock", "digits"]) == actual


def test_without_posteriors_there_is_none():
    result = TaskResult(0.9, None, {"clock": 7})
    assert Evaluation({"clock": result}).calibration(["clock"]) is None
    former = Evaluation({"clock": result}).to_json()
    del former["clock"]["calibration"]
    assert Evaluation.from_json(former).results["clock"].calibration is None


@pytest.mark.parametrize("summary", [None, "{", "{}", '{"calibration": 3}'])
def test_a_pool_without_a_runs_summary_has_none(tmp_path, summary):
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    assert calibration_of_run(tmp_path / "pool") is None


def test_a_runs_calibration_is_read_beside_its_pool(tmp_path):
    known = Calibration.of(np.array([1.0, 0.2]), np.array([True, False]))
    (tmp_path / "summary.json").write_text(json.dumps({"calibration": {"bins": known.to_json()}}))
    assert calibration_of_run(tmp_path / "pool") == known


def test_choices_of_a_pool_are_as_sure_as_their_router(known_pool, tiny_base):
    rows, owners = claimed_prompts(tiny_base, 2, seed=3)
    features_NF, routers = statistics_features(tiny_base, rows), Routers(known_pool)
    of_task = {owner or "base": [i for i, o in enumerate(owners) if o == owner] for owner in dict.fromkeys(owners)}
    parts = [features_NF[places] for places in of_task.values()]
    counts, names, ranked = [len(part) for part in parts], known_pool.names, ranking(routers, "routed", parts)
    found = calibrations(names, list(of_task), counts, ranked)
    assert [sum(c.counts) for c in found if c is not None] == counts
    assert all(c is not None and c.right == c.counts for c in found)
    wrong = calibrations(names, ["base"] * len(parts), counts, ranked)
    assert [c.error > 0.9 for c in wrong if c is not None] == [owner != "base" for owner in of_task]
    tasks = list(of_task)
    for one, other in zip(
        choices(routers, "routed", tasks, parts), choices(routers, "routed", tasks, parts, ranked), strict=True
    ):
        assert one.tolist() == other.tolist()
    token = Routers(known_pool.routed_by(kind="token"))
    for nothing in (ranking(routers, "oracle", parts), ranking(None, "routed", parts), ranking(token, "routed", parts)):
        assert nothing is None
    assert calibrations(names, ["base"], counts[:1], None) == [None]
