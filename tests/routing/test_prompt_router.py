"""The closed-form router against the same classifier computed from all tasks' features at once."""

import dataclasses

import pytest
import torch
from scipy.stats import multivariate_t

from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import BaseOnly, PromptRoute, to_pool_weights
from pipeline.routing.statistics import PromptStatistics

F = 10
COUNTS = (40, 25, 60, 33)


def task_features(task: int, count: int | None = None, *, seed: int = 0) -> torch.Tensor:
    """Features of one task's prompts: its own centre, one covariance for all."""
    shared = torch.Generator().manual_seed(99)
    mixing_FF = torch.randn(F, F, generator=shared) / F**0.5
    centres = 2 * torch.randn(len(COUNTS), F, generator=shared)
    own = torch.Generator().manual_seed(100 * seed + task)
    return centres[task] + torch.randn(count or COUNTS[task], F, generator=own) @ mixing_FF


FEATURES = [task_features(task) for task in range(len(COUNTS))]
STATISTICS = [PromptStatistics.of(x_NF, quantile=0.99) for x_NF in FEATURES]
NEW_BF = torch.cat([task_features(task, 8, seed=1) for task in range(len(COUNTS))])
NEW_TASKS = torch.arange(len(COUNTS)).repeat_interleave(8)


def relative(scores_BC: torch.Tensor) -> torch.Tensor:
    """Scores up to a constant of each prompt."""
    return scores_BC - scores_BC.mean(-1, keepdim=True)


def joint_scores(
    features: list[torch.Tensor], x_BF: torch.Tensor, shrinkage: float, beside: int | None = None
) -> torch.Tensor:
    """What blended covariances predict, by SciPy's t distribution, from all tasks' features together.

    The prior of a task's covariance is that of all tasks; `beside` a task, it is that task's blended one.
    """
    features = [f.double() for f in features]
    everything_NF = torch.cat(features)
    residuals_NF = torch.cat([f - f.mean(0) for f in features])
    within_FF = residuals_NF.T @ residuals_NF / len(everything_NF)
    variance_F = everything_NF.var(0, correction=0)
    scale_F = (variance_F + 1e-6 * variance_F.mean() + 1e-12).sqrt()

    def blended(own_NF: torch.Tensor, prior: float, prior_FF: torch.Tensor) -> torch.Tensor:
        return (len(own_NF) * torch.cov(own_NF.T, correction=0) + prior * prior_FF) / (len(own_NF) + prior)

    prior, prior_FF = 0.4 * F, within_FF
    if beside is not None:
        prior, prior_FF = 2 * F, blended(features[beside], 0.4 * F, within_FF)
    scores = []
    for own_NF in features:
        count, blended_FF = len(own_NF), blended(own_NF, prior, prior_FF)
        standard_FF = (1 - shrinkage) * blended_FF / torch.outer(scale_F, scale_F) + shrinkage * torch.eye(F).double()
        predictive = multivariate_t(
            (own_NF.mean(0) / scale_F).numpy(), ((1 + 1 / count) * standard_FF).numpy(), df=count + prior
        )
        scores.append(torch.from_numpy(predictive.logpdf((x_BF.double() / scale_F).numpy())))
    return torch.stack(scores, dim=-1)


def joint_null(experts: int) -> torch.Tensor:
    """Scores of the first tasks as experts (B, E + 1): all others are the null expert's, beside each prompt's likeliest."""
    plain_BC = joint_scores(FEATURES, NEW_BF, 0.05)
    likeliest_B = plain_BC[:, :experts].argmax(-1)
    beside_BC = torch.stack([joint_scores(FEATURES, NEW_BF, 0.05, beside=e) for e in range(experts)])[
        likeliest_B, torch.arange(len(NEW_BF))
    ]
    null_B = torch.maximum(plain_BC[:, experts:].logsumexp(-1), beside_BC[:, experts:].logsumexp(-1))
    return torch.cat([plain_BC[:, :experts], null_B.unsqueeze(-1)], dim=-1)


def weights(router: PromptRouter, x_BF: torch.Tensor) -> torch.Tensor:
    """Returns how much of each prompt every expert gets (B, E)."""
    match router.route(x_BF):
        case BaseOnly():
            return torch.zeros(len(x_BF), len(router.experts))
        case PromptRoute(experts_BM, weights_BM):
            return to_pool_weights(weights_BM, experts_BM, len(router.experts)).expand(len(x_BF), -1)
    raise AssertionError


@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_summed_statistics_give_the_router_of_all_features_together(shrinkage):
    actual = PromptRouter(STATISTICS, shrinkage=shrinkage).scores(NEW_BF)
    torch.testing.assert_close(relative(actual), relative(joint_scores(FEATURES, NEW_BF, shrinkage)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("experts", [3, 2])
def test_the_null_expert_is_scored_beside_the_likeliest_expert_and_its_components_add_up(experts):
    actual = PromptRouter(STATISTICS[:experts], STATISTICS[experts:]).scores(NEW_BF)
    torch.testing.assert_close(relative(actual), relative(joint_null(experts)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1)])
def test_beside_a_null_expert_the_order_of_tasks_does_not_matter_either(order):
    first, other = (PromptRouter([STATISTICS[i] for i in ids], STATISTICS[3:]) for ids in ((0, 1, 2), order))
    torch.testing.assert_close(other.scores(NEW_BF), first.scores(NEW_BF)[:, [*order, 3]], rtol=0, atol=1e-8)


def test_only_the_likeliest_by_the_linear_score_are_scored_in_full():
    router = PromptRouter(STATISTICS[:3], STATISTICS[3:])
    actual, whole = router.scores(NEW_BF, candidates=2), router.scores(NEW_BF)
    assert actual.isinf().sum(-1).eq(1).all()
    torch.testing.assert_close(actual[actual.isfinite()], whole[actual.isfinite()])
    assert actual.argmax(-1).equal(whole.argmax(-1))


def test_a_class_of_few_prompts_keeps_what_a_class_of_many_resembles():
    """The base has shown 40 prompts of an ability, a task 2,000 that are much like them."""
    random = torch.Generator().manual_seed(5)
    mixing_FF = torch.randn(96, 96, generator=random) / 96**0.5
    ability_NF = torch.randn(540, 96, generator=random) @ mixing_FF
    task_NF = 0.55 + torch.randn(2500, 96, generator=random) @ mixing_FF * 0.8
    router = PromptRouter([PromptStatistics.of(task_NF[:2000])], [PromptStatistics.of(ability_NF[:40])])
    assert (weights(router, task_NF[2000:])[:, 0] == 1).float().mean() > 0.99
    assert (weights(router, ability_NF[40:])[:, 0] == 0).float().mean() > 0.99


def test_a_task_that_resembles_an_ability_leaves_it_to_the_base_beside_very_different_tasks():
    """The task and the ability lie close and vary little; the covariance of all is made by a task that varies much."""
    random = torch.Generator().manual_seed(5)
    mixing_FF = 0.3 * torch.randn(96, 96, generator=random) / 96**0.5
    ability_NF = torch.randn(540, 96, generator=random) @ mixing_FF
    task_NF = torch.randn(1300, 96, generator=random) @ mixing_FF + 0.15
    wide_NF = torch.randn(800, 96, generator=random) + 1
    tasks = [PromptStatistics.of(x_NF) for x_NF in (task_NF[:800], wide_NF)]
    router = PromptRouter(tasks, [PromptStatistics.of(ability_NF[:40])])
    assert (weights(router, task_NF[800:])[:, 0] == 1).float().mean() > 0.99
    assert (weights(router, ability_NF[40:]).sum(-1) == 0).float().mean() > 0.99


def test_statistics_collected_in_parts_give_the_same_router():
    parts = [PromptStatistics.of(x[:11]) + PromptStatistics.of(x[11:]) for x in FEATURES]
    actual, whole = (PromptRouter(s).scores(NEW_BF) for s in (parts, STATISTICS))
    torch.testing.assert_close(actual, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2)])
def test_the_order_of_tasks_does_not_matter(order):
    first, other = PromptRouter(STATISTICS), PromptRouter([STATISTICS[i] for i in order])
    torch.testing.assert_close(other.scores(NEW_BF), first.scores(NEW_BF)[:, list(order)], rtol=0, atol=1e-8)
    assert weights(other, NEW_BF).equal(weights(first, NEW_BF)[:, list(order)])


def test_it_finds_the_task_of_new_prompts():
    for router in (PromptRouter(STATISTICS), PromptRouter(STATISTICS[:3], STATISTICS[3:])):
        assert (router.scores(NEW_BF).argmax(-1) == NEW_TASKS).float().mean() > 0.95


def test_base_prompts_go_to_the_base():
    weights_BE = weights(PromptRouter(STATISTICS[:3], STATISTICS[3:]), NEW_BF)
    assert weights_BE.shape == (len(NEW_BF), 3)
    assert not weights_BE[NEW_TASKS == 3].any()
    assert (weights_BE[NEW_TASKS < 3].sum(-1) == 1).float().mean() > 0.9


def test_a_choice_is_one_expert_entirely():
    weights_BE = weights(PromptRouter(STATISTICS), NEW_BF)
    assert ((weights_BE == 0) | (weights_BE == 1)).all()
    assert (weights_BE.sum(-1) <= 1).all()


def test_without_a_null_expert_it_abstains_beyond_every_threshold():
    router = PromptRouter(STATISTICS[:3])
    far_BF = NEW_BF + 40
    assert all((s.distance(far_BF) > s.threshold).all() for s in STATISTICS[:3])
    assert not weights(router, far_BF).any()
    assert (weights(router, NEW_BF[NEW_TASKS == 0])[:, 0] == 1).float().mean() > 0.8


def test_an_expert_whose_threshold_excludes_the_prompt_cannot_be_chosen():
    closed = dataclasses.replace(STATISTICS[0], threshold=0.0)
    open_ = dataclasses.replace(STATISTICS[1], threshold=float("inf"))
    weights_BE = weights(PromptRouter([closed, open_]), NEW_BF)
    assert weights_BE[:, 1].all()
    assert not weights_BE[:, 0].any()


def test_without_experts_the_base_answers():
    for null in ((), STATISTICS[:1]):
        assert weights(PromptRouter([], null), NEW_BF).shape == (len(NEW_BF), 0)


def test_one_expert_takes_what_lies_within_its_threshold():
    weights_BE = weights(PromptRouter(STATISTICS[:1]), NEW_BF)
    inside_B = STATISTICS[0].distance(NEW_BF) <= STATISTICS[0].threshold
    assert weights_BE[:, 0].bool().equal(inside_B)
    assert 0 < inside_B.sum() < len(NEW_BF)


def test_a_text_only_task_beside_tasks_with_images():
    text_NF = FEATURES[0].clone()
    text_NF[:, :6] = 0
    router = PromptRouter([PromptStatistics.of(text_NF), *STATISTICS[1:]])
    assert router.scores(text_NF).isfinite().all()
    assert (weights(router, text_NF)[:, 0] == 1).all()


def test_prompts_that_are_all_the_same_make_a_router():
    same_NF = torch.full((20, F), 300.0) + torch.arange(F)
    for others in ([], STATISTICS):
        router = PromptRouter([PromptStatistics.of(same_NF, quantile=0.99), *others])
        assert (weights(router, same_NF)[:, 0] == 1).all()
        assert not weights(router, same_NF - 30)[:, 0].any()
