"""Which experts a prompt's list holds, and with what prior."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.routing.prompt_router import CANDIDATES, PromptRouter
from pipeline.routing.routes import MIN_WEIGHT, NULL_EXPERT, BaseOnly, LayerRoute, PromptRoute
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.two_level import TwoLevelRouter

F, TASKS = 8, 4
CENTRES = 7 * torch.eye(TASKS, F)
"""So far apart that a prompt between two tasks has nothing of a third."""
FEATURES = [
    centre_F + torch.randn(200, F, generator=torch.Generator().manual_seed(task))
    for task, centre_F in enumerate(CENTRES)
]
STATISTICS = [PromptStatistics.of(x_NF) for x_NF in FEATURES]
NULL = STATISTICS[3]
WITH_NULL = PromptRouter(STATISTICS[:3], [NULL])
ALL = PromptRouter(STATISTICS)
"""Four experts of infinite threshold."""


def two_level(prompts: PromptRouter = WITH_NULL, *, candidates: int = 3, temperature: float = 1.0) -> TwoLevelRouter:
    return TwoLevelRouter(prompts, candidates=candidates, temperature=temperature)


def between(one: int, other: int, odds: float, prompts: PromptRouter = WITH_NULL) -> Tensor:
    """Returns a prompt (1, F) on the line between two classes, `one` likelier than `other` by `odds`."""
    means_CF = torch.stack([s.mean_F for s in [*prompts.experts, *prompts.null]])

    def at(share: float) -> Tensor:
        return ((1 - share) * means_CF[one] + share * means_CF[other])[None]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        scores_C = prompts.scores(at(middle))[0]
        low, high = (middle, high) if scores_C[one] - scores_C[other] > math.log(odds) else (low, middle)
    return at(low)


def own(task: int) -> Tensor:
    """Returns the prompt (1, F) that is most its task's own."""
    return STATISTICS[task].mean_F[None]


def test_a_clear_prompt_is_the_prompt_routers():
    route = two_level().route(own(0))
    assert isinstance(route, PromptRoute)
    assert route.experts_BM.tolist() == [[0]]
    assert route.weights_BM.tolist() == [[1.0]]


def test_clear_prompts_share_one_place_where_they_agree():
    agreed = two_level().route(torch.cat([own(1), own(1)]))
    assert isinstance(agreed, PromptRoute)
    assert agreed.experts_BM.tolist() == [[1]]
    each = two_level().route(torch.cat([own(2), own(3), own(0)]))
    assert isinstance(each, PromptRoute)
    assert each.experts_BM.tolist() == [[2], [NULL_EXPERT], [0]]
    assert each.weights_BM.tolist() == [[1.0]] * 3


def test_base_prompts_have_the_base_alone():
    assert two_level().route(own(3)) == BaseOnly()


@pytest.mark.parametrize("odds", [1.5, 20.0, 500.0])
def test_an_ambiguous_prompt_has_a_list_with_its_log_posterior(odds):
    route = two_level(temperature=0.7).route(between(1, 0, odds))
    assert isinstance(route, LayerRoute)
    assert route.experts_BM.tolist() == [[1, 0]]
    assert route.prior_BM.dtype == torch.float32
    expected = torch.tensor([[odds / (odds + 1), 1 / (odds + 1)]])
    torch.testing.assert_close(route.prior_BM.exp(), expected, rtol=1e-3, atol=1e-4)
    assert (route.top_k, route.temperature) == (2, 0.7)


def test_whoever_is_slight_is_not_listed():
    assert isinstance(two_level().route(between(1, 0, 0.9 / MIN_WEIGHT)), LayerRoute)
    assert isinstance(two_level().route(between(1, 0, 1.1 / MIN_WEIGHT)), PromptRoute)


@pytest.mark.parametrize(("one", "other", "listed"), [(0, 3, [0, NULL_EXPERT]), (3, 0, [NULL_EXPERT, 0])])
def test_the_base_may_stand_on_the_list(one, other, listed):
    route = two_level().route(between(one, other, 3.0))
    assert isinstance(route, LayerRoute)
    assert route.experts_BM.tolist() == [listed]
    torch.testing.assert_close(route.prior_BM.exp(), torch.tensor([[0.75, 0.25]]), rtol=1e-3, atol=1e-3)


def test_the_prior_is_the_posterior_of_the_prompts_scores():
    for prompts in (WITH_NULL, ALL):
        x_BF = torch.cat([between(0, 1, 2.0, prompts), between(2, 1, 2.0, prompts), between(3, 0, 2.0, prompts)])
        route = two_level(prompts, candidates=4).route(x_BF)
        assert isinstance(route, LayerRoute)
        posterior_BC = prompts.scores(x_BF).softmax(-1)
        kept_BM = route.prior_BM.isfinite()
        found_BM = posterior_BC.gather(-1, route.experts_BM % 4)
        torch.testing.assert_close(route.prior_BM.exp()[kept_BM], found_BM[kept_BM].float())
        assert (found_BM[~kept_BM] < MIN_WEIGHT).all()
        falling_BM = route.prior_BM.sort(-1, descending=True).values
        assert route.prior_BM.equal(falling_BM)


def test_rows_with_different_lists_stand_in_one_batch():
    x_BF = torch.cat([own(2), between(0, 1, 3.0), between(3, 2, 3.0)])
    route = two_level().route(x_BF)
    assert isinstance(route, LayerRoute)
    assert route.experts_BM.shape == route.prior_BM.shape == (3, 2)
    assert route.experts_BM[0, 0] == 2
    assert route.prior_BM[0].exp().tolist() == pytest.approx([1, 0], abs=1e-3)
    assert route.prior_BM[0, 1] == -torch.inf
    assert route.experts_BM[1:].tolist() == [[0, 1], [NULL_EXPERT, 2]]


def test_the_list_of_a_row_does_not_depend_on_its_batch_mates():
    """One row's likeliest is slight itself; who is slight on the other row's list stays off it all the same."""
    crowd = PromptRouter([*STATISTICS[:2], *[STATISTICS[2]] * 1500], [NULL])
    x_BF = torch.cat([between(1, 0, 1.2 / MIN_WEIGHT, crowd), own(2)])
    route = two_level(crowd).route(x_BF)
    assert isinstance(route, LayerRoute)
    assert route.prior_BM[0].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_is_always_a_candidate_however_many_are_equally_likely(count):
    crowd = PromptRouter([STATISTICS[0]] * 1500, [NULL])
    route = two_level(crowd, candidates=count).route(FEATURES[0][:4])
    experts_BM = route.experts_BM
    assert experts_BM.shape[-1] == count
    if count > 1:
        assert isinstance(route, LayerRoute)
        assert route.top_k == count
        torch.testing.assert_close(route.prior_BM.exp(), torch.full((4, count), 1 / CANDIDATES), rtol=1e-3, atol=0)


def test_a_list_is_never_longer_than_there_are_classes():
    for prompts, classes in ((WITH_NULL, 4), (ALL, 4)):
        x_BF = torch.stack([s.mean_F for s in STATISTICS]).mean(0, keepdim=True)
        route = two_level(prompts, candidates=50).route(x_BF)
        assert isinstance(route, (LayerRoute, PromptRoute))
        assert route.experts_BM.shape[-1] <= classes
    alone = PromptRouter(STATISTICS[:1], STATISTICS[:1])
    route = two_level(alone, candidates=50).route(own(0))
    assert isinstance(route, LayerRoute)
    assert sorted(route.experts_BM[0].tolist()) == [NULL_EXPERT, 0]


def test_a_list_of_one_place_is_the_prompt_router():
    x_BF = torch.cat([FEATURES[2][:5], between(0, 1, 1.1), between(0, 3, 1.1)])
    actual, expected = two_level(candidates=1).route(x_BF), WITH_NULL.route(x_BF)
    assert isinstance(actual, PromptRoute)
    assert isinstance(expected, PromptRoute)
    assert actual.experts_BM.equal(expected.experts_BM)
    assert actual.weights_BM.equal(expected.weights_BM)


def test_without_base_prompts_a_far_one_has_the_base_alone():
    prompts = PromptRouter([PromptStatistics.of(x_NF, quantile=0.99) for x_NF in FEATURES[:3]])
    far_BF = 40 + FEATURES[0][:3]
    assert two_level(prompts).route(far_BF) == BaseOnly()
    mixed = two_level(prompts).route(torch.cat([far_BF[:1], own(1)]))
    assert isinstance(mixed, PromptRoute)
    assert mixed.experts_BM.tolist() == [[NULL_EXPERT], [1]]
    beside = two_level(ALL).route(between(0, 1, 2.0, ALL))
    assert isinstance(beside, LayerRoute)
    assert beside.experts_BM.tolist() == [[0, 1]]


def test_without_experts_the_base_answers():
    for null in ((), [NULL]):
        assert two_level(PromptRouter([], null)).route(torch.zeros(2, F)) == BaseOnly()
