"""Experts that come and go one at a time against the router that is solved from all of them at once."""

import pytest
import torch
from torch import Tensor

from pipeline.routing.coarse import coarse_statistics, projected
from pipeline.routing.mean_index import MeanIndex
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.statistics import PromptStatistics

SIZES = [(3, 8), (12, 24), (66, 16), (20, 264)]
"""Experts, features."""


def drawn(count: int, width: int, *, apart: float = 1.0, rows: int = 40, seed: int = 0) -> list[Tensor]:
    """Returns prompts of tasks, each with a spread of its own."""
    random = torch.Generator().manual_seed(seed)
    return [
        apart * torch.randn(width, generator=random)
        + torch.randn(rows, width, generator=random) * (torch.rand(width, generator=random) + 0.3)
        for _ in range(count)
    ]


def summarised(tasks: list[Tensor]) -> list[PromptStatistics]:
    return [PromptStatistics.of(x_NF) for x_NF in tasks]


def same(one: PromptRouter, other: PromptRouter, x_BF: Tensor) -> None:
    """Fails where two routers differ by more than rounding."""
    (ours_BM, posterior_BM), (theirs_BM, expected_BM) = (router.rank_candidates(x_BF, 3) for router in (one, other))
    torch.testing.assert_close(posterior_BM.exp(), expected_BM.exp(), rtol=1e-7, atol=1e-9)
    likely_BM = expected_BM.exp() > 1e-9
    assert ours_BM[likely_BM].equal(theirs_BM[likely_BM])


@pytest.mark.parametrize(("count", "width"), SIZES)
@pytest.mark.parametrize("null", [0, 2])
def test_experts_that_came_one_by_one_in_another_order(count, width, null):
    tasks = drawn(count + null, width)
    experts, components = summarised(tasks)[:count], summarised(tasks)[count:]
    router = PromptRouter(experts[:1], components)
    for number in range(count - 1, 0, -1):
        router = router.insert(1, experts[number])
    same(router, PromptRouter(experts, components), torch.cat([x_NF[:2] for x_NF in tasks]))


@pytest.mark.parametrize(("count", "width"), SIZES)
@pytest.mark.parametrize("null", [0, 2])
def test_experts_that_are_taken_away_were_never_there(count, width, null):
    tasks = drawn(2 * count + null, width)
    statistics = summarised(tasks)
    router = PromptRouter(statistics[: 2 * count], statistics[2 * count :])
    for position in range(count):
        router = router.remove(position)  # every second one
    expected = PromptRouter(statistics[1 : 2 * count : 2], statistics[2 * count :])
    same(router, expected, torch.cat([x_NF[:2] for x_NF in tasks]))


def test_the_last_expert_may_go_and_the_first_may_come():
    (one,) = summarised(drawn(1, 8))
    for null in ((), (one,)):
        empty = PromptRouter([one], null).remove(0)
        assert empty.choices(one.mean_F[None]).tolist() == [-1]
        assert len(empty.insert(0, one).experts) == 1


def test_what_goes_leaves_the_retired_ones_retired():
    tasks = drawn(4, 8, apart=8)
    router = PromptRouter(summarised(tasks), retired=[1, 3])
    x_BF = torch.stack([x_NF.mean(0) for x_NF in tasks])
    assert router.choices(x_BF).tolist() == [0, -1, 2, -1]
    assert router.remove(0).choices(x_BF[1:]).tolist() == [-1, 1, -1]
    assert router.remove(1).choices(x_BF[[0, 2, 3]]).tolist() == [0, 1, -1]
    assert router.insert(1, router.experts[1]).retired == {2, 4}
    assert router.retiring([]).choices(x_BF).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_sums_are_those_of_all_prompts_together(count, width):
    tasks = drawn(count, width)
    pooled = PooledStatistics.of(summarised(tasks))
    all_NF = torch.cat(tasks).double()
    torch.testing.assert_close(pooled.mean_F, all_NF.mean(0))
    torch.testing.assert_close(pooled.squares_F, (all_NF - all_NF.mean(0)).square().sum(0))
    centred_NF = torch.cat([x_NF.double() - x_NF.double().mean(0) for x_NF in tasks])
    torch.testing.assert_close(pooled.scatter_FF, centred_NF.T @ centred_NF)


def test_sums_lose_no_digits_when_classes_come_and_go():
    statistics = summarised(drawn(30, 16))
    pooled = expected = PooledStatistics.of(statistics[:10])
    for _ in range(50):
        for s in statistics[10:]:
            pooled += s
        for s in statistics[10:]:
            pooled -= s
    for part in ("mean_F", "squares_F", "scatter_FF"):
        torch.testing.assert_close(getattr(pooled, part), getattr(expected, part), rtol=1e-9, atol=1e-9)
    assert pooled.count == expected.count


def test_nothing_has_no_sums():
    with pytest.raises(ValueError, match="no class"):
        PooledStatistics.of([])


@pytest.mark.parametrize("width", [8, 64])
def test_distances_are_mahalanobis_by_the_shared_covariance(width):
    tasks = drawn(5, width)
    statistics = summarised(tasks)
    index = MeanIndex.of(statistics, PooledStatistics.of(statistics), shrinkage=0.05)
    all_NF, x_BF = torch.cat(tasks).double(), torch.cat(tasks)[::7].double()
    centred_NF = torch.cat([x_NF.double() - x_NF.double().mean(0) for x_NF in tasks])
    scale_FF = all_NF.var(0, correction=0).diag()
    shared_FF = 0.95 * centred_NF.T @ centred_NF / len(all_NF) + 0.05 * scale_FF
    apart_BCF = x_BF[:, None] - torch.stack([s.mean_F for s in statistics])
    expected_BC = torch.einsum("bcf,fg,bcg->bc", apart_BCF, shared_FF.inverse(), apart_BCF)
    torch.testing.assert_close(index.distances(x_BF).double(), expected_BC, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("apart", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("null", [0, 3])
def test_what_few_features_decide_all_of_them_do(apart, null):
    """Prompts of all tasks, and some that are like none."""
    tasks = drawn(30 + null, 264, apart=apart, rows=120)
    statistics = [PromptStatistics.of(x_NF[:80], quantile=0.99) for x_NF in tasks]
    far_NF = 10 * torch.randn(40, 264, generator=torch.Generator().manual_seed(1))
    x_BF = torch.cat([*(x_NF[80::8] for x_NF in tasks), far_NF])
    router = PromptRouter(statistics[:30], statistics[30:])
    assert router.few is not None
    actual_BM, log_posterior_BM = router.rank_candidates(x_BF, 2)
    router.few = None
    expected_BM, expected = router.rank_candidates(x_BF, 2)
    likely_BM = expected.exp() > 1e-9
    assert actual_BM[likely_BM].equal(expected_BM[likely_BM])
    torch.testing.assert_close(log_posterior_BM.exp(), expected.exp(), rtol=0, atol=1e-9)


def test_few_features_are_for_many_experts_of_many():
    assert PromptRouter(summarised(drawn(15, 264, rows=6))).few is None
    assert PromptRouter(summarised(drawn(16, 256, rows=6))).few is None
    router = PromptRouter(summarised(drawn(16, 264, rows=6)))
    assert router.few is not None
    assert router.remove(3).few is None
    again = router.remove(3).insert(0, router.experts[3])
    assert again.few is not None


def test_statistics_in_few_features_are_those_of_the_projected_prompts():
    (x_NF,) = drawn(1, 264, rows=50)
    actual, expected = coarse_statistics(PromptStatistics.of(x_NF)), PromptStatistics.of(projected(x_NF))
    assert actual.count == expected.count
    torch.testing.assert_close(actual.mean_F, expected.mean_F)
    torch.testing.assert_close(actual.scatter_FF, expected.scatter_FF, rtol=1e-5, atol=1e-4)


def test_a_batch_is_decided_like_one_prompt_at_a_time(monkeypatch):
    tasks = drawn(30, 16)
    router = PromptRouter(summarised(tasks)[:-2], summarised(tasks)[-2:])
    x_BF = torch.cat([x_NF[:3] for x_NF in tasks])
    whole = router.choices(x_BF)
    assert torch.cat([router.choices(x_1F[None]) for x_1F in x_BF]).equal(whole)
    monkeypatch.setattr("pipeline.routing.prompt_router.AT_ONCE", 100)
    assert router.choices(x_BF).equal(whole)
