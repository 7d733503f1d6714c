"""From a checkpoint folder to another process that has the pool from the registry, for the family that differs most.

All of them: `pointsman benchmark families`.
"""

import pytest

from jobs.benchmark.families import difference, prove
from pipeline.routing import Pool

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def actual(output):
    """A family with marks, grids and a list of features, of which the tower is not even loaded."""
    return prove([], ["qwen2_5_vl"], output, tasks=1, steps=3)


def test_another_process_finds_the_same(actual):
    assert actual.keys() == {"qwen2_5_vl (kept)"}
    for proof in actual.values():
        assert proof["logit_difference"] <= 1e-5 < proof["effect_of_experts"]
        assert proof["decisions_equal"]
        assert proof["code_from_registry"]
        assert proof["proven"]
        assert len(proof["decisions"]) == proof["prompts"] == 6


def test_image_features_were_kept(actual, output):
    assert any((output / "data" / "features").glob("digits-*/_SUCCESS"))


def test_pools_are_told_apart(actual, output):
    pool = Pool.load(output / "qwen2_5_vl-kept" / "pool")
    assert difference(pool, pool)["weight_difference"] == 0
    other = Pool.load(output / "qwen2_5_vl-kept" / "pool")
    next(iter(other.experts["digits"].adapters.values())).b_OR[0, 0] += 0.5
    assert difference(pool, other)["weight_difference"] == pytest.approx(0.5)
