"""The closed form against the same classifier made from all samples at once, and against scikit-learn's."""

import gc
import weakref
from itertools import permutations

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from pipeline.routing.gaussian import Gaussians, solve
from pipeline.routing.statistics import PromptStatistics
from tests.routing.test_prompt_router import FEATURES, NEW_BF, NEW_TASKS, STATISTICS, F, relative, task_features

EXACT = {"rtol": 0, "atol": 1e-5}


def scores(classes: list[PromptStatistics], x_BF: Tensor = NEW_BF, *, shrinkage: float = 0.05) -> Tensor:
    """Returns scores up to a constant of each row (B, C)."""
    weight_CF, bias_C = solve(classes, shrinkage=shrinkage)
    return relative(x_BF.double() @ weight_CF.T + bias_C)


def together(samples: list[Tensor], shrinkage: float) -> Tensor:
    """The formulas of the module's docstring on all samples together, with inverses in full (B, C)."""
    samples = [x_NF.double() for x_NF in samples]
    centred_NF = torch.cat([x_NF - x_NF.mean(0) for x_NF in samples])
    sigma_FF = centred_NF.T @ centred_NF / len(centred_NF)
    variance_F = torch.cat(samples).var(0, correction=0)
    s_FF = (variance_F + 1e-6 * variance_F.mean()).sqrt().diag()  # with the floor of `PromptStatistics.scale_F`
    c_FF = (1 - shrinkage) * s_FF.inverse() @ sigma_FF @ s_FF.inverse() + shrinkage * torch.eye(F).double()
    precision_FF = s_FF.inverse() @ c_FF.inverse() @ s_FF.inverse()
    rows = []
    for x_NF in samples:
        w_F = precision_FF @ x_NF.mean(0)
        rows.append(NEW_BF.double() @ w_F - x_NF.mean(0) @ w_F / 2)
    return relative(torch.stack(rows, dim=-1))


@pytest.mark.parametrize("shrinkage", [0.001, 0.05, 0.5, 0.999])
def test_summed_statistics_give_the_classifier_of_all_samples(shrinkage):
    torch.testing.assert_close(scores(STATISTICS, shrinkage=shrinkage), together(FEATURES, shrinkage), **EXACT)


def test_without_shrinkage_it_is_linear_discriminant_analysis():
    samples = [task_features(task, 50) for task in range(4)]
    stock = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4)
    stock.fit(torch.cat(samples).double().numpy(), torch.arange(4).repeat_interleave(50).numpy())
    expected = relative(torch.from_numpy(stock.decision_function(NEW_BF.double().numpy())))
    actual = scores([PromptStatistics.of(x_NF) for x_NF in samples], shrinkage=1e-12)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("order", list(permutations(range(4)))[5::6])
def test_the_order_of_classes_does_not_matter(order):
    torch.testing.assert_close(scores([STATISTICS[c] for c in order]), scores(STATISTICS)[:, list(order)], **EXACT)


@pytest.mark.parametrize("sizes", [(1, 24), (7, 7, 11), (24, 1)])
def test_classes_whose_statistics_were_taken_in_parts(sizes):
    parts = [PromptStatistics.of(x_NF) for x_NF in FEATURES[1].split(sizes)]
    classes = [STATISTICS[0], sum(parts[1:], start=parts[0]), *STATISTICS[2:]]
    torch.testing.assert_close(scores(classes), scores(STATISTICS), **EXACT)


def test_a_class_that_is_left_out_was_never_there():
    torch.testing.assert_close(
        scores([STATISTICS[0], *STATISTICS[2:]]), together([FEATURES[0], *FEATURES[2:]], 0.05), **EXACT
    )


def test_priors_are_equal_however_many_samples_a_class_has():
    many = [STATISTICS[0], sum([STATISTICS[1]] * 50, start=STATISTICS[1])]
    middle_F = (STATISTICS[0].mean_F + STATISTICS[1].mean_F) / 2
    torch.testing.assert_close(scores(many, middle_F[None]), torch.zeros(1, 2).double(), **EXACT)


def test_it_finds_the_class_of_new_samples():
    assert (scores(STATISTICS).argmax(-1) == NEW_TASKS).float().mean() > 0.95


def test_one_class_alone_has_nobody_to_differ_from():
    weight_CF, bias_C = solve(STATISTICS[:1], shrinkage=0.05)
    assert weight_CF.dtype == bias_C.dtype == torch.float64
    assert weight_CF.equal(torch.zeros(1, F).double())
    assert bias_C.equal(torch.zeros(1).double())


def test_features_that_never_vary_say_nothing():
    fixed = [torch.cat([x_NF, torch.full((len(x_NF), 2), 7.0)], dim=-1) for x_NF in FEATURES]
    seen = torch.cat([NEW_BF, torch.full((len(NEW_BF), 2), 7.0)], dim=-1)
    actual = scores([PromptStatistics.of(x_NF) for x_NF in fixed], seen)
    torch.testing.assert_close(actual, scores(STATISTICS), rtol=1e-4, atol=1e-3)


def test_what_was_computed_is_freed_with_the_last_reference() -> None:
    """A pool's factors are megabytes each, and an evaluation after each task makes new ones."""
    samples_NF = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    gaussians = Gaussians([PromptStatistics.of(samples_NF), PromptStatistics.of(samples_NF + 3)], shrinkage=0.05)
    gaussians.scores(samples_NF, torch.arange(2).expand(40, 2))
    gone = weakref.ref(gaussians)
    gc.disable()
    try:
        del gaussians
        assert gone() is None
    finally:
        gc.enable()
