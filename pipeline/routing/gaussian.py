"""The closed-form classifiers that all routing rests on: Gaussians solved from summed statistics. Equal priors.

One covariance for all (`solve`: linear, so it costs F for each class; for the Linears, and for the first selection of prompts):

    Sigma = sum_c scatter_c / sum_c count_c           C = (1 - s) S^-1 Sigma S^-1 + s I,   S = sqrt(diag Sigma_total)
    score_c(x) = <x, w_c> + b_c                       w_c = S^-1 C^-1 S^-1 m_c,  b_c = -<m_c, w_c> / 2

Own covariances blended with the shared one (`Gaussians`: F x F for each class; the final choice for prompts):

    Sigma_c = (scatter_c + n_0 Sigma) / (n_c + n_0)   C_c = (1 + 1 / n_c) ((1 - s) S^-1 Sigma_c S^-1 + s I),   n_0 = 0.4 F
    score_c(x) = -(nu + F) / 2 log(1 + d^2 / nu) - log det L_c + log Gamma((nu + F) / 2) - log Gamma(nu / 2) - F / 2 log nu
                                                      C_c = L_c L_c^T,  d = |L_c^-1 S^-1 (x - m_c)|,  nu = n_c + n_0

The blend is that of regularised discriminant analysis (Friedman, JASA 1989). `Sigma` then is a prior worth n_0 prompts, and
the score is what it predicts of the next prompt: a t distribution, whose tails are the wider the fewer prompts a class has
shown (Murphy, Conjugate Bayesian analysis of the Gaussian distribution, 2007, with nu for nu - F + 1). A class known from 40
prompts so keeps what resembles it beside a class known from thousands; with normal tails the latter took it.

A class of few prompts beside one of many that resembles it (`Gaussians.beside`): Sigma is too wide a prior for it, since its
prompts are spread like those of the class that it resembles, not like those of all; the latter then wins by its smaller
determinant alone. Beside class t its prior is Sigma_t, worth 2 F prompts, in the same formulas.

Of several questions about one image, n_c counts the images, and scatter_c is that share of the prompts' scatter.

Only sums enter: the order of the classes does not matter, the result equals that of all samples together, and a class is
forgotten exactly by leaving its term out. Shapes: B prompts, F features, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky

PRIOR = 0.4
"""Prompts that the shared covariance is worth, per feature."""
LIKENESS = 2
"""Prompts that the covariance of a class beside it is worth, per feature. Less costs tasks prompts that are theirs, more
costs the base those that are its own (measured at F = 384 and 128 on four streams of look-alikes)."""
FACTORS = 128
"""Cholesky factors that are kept, those asked for last: 2 MB each at F = 512."""


@dataclass(frozen=True, eq=False)
class _Covariances:
    """The covariances of classes, each blended with that of all, or with that of a class beside it."""

    classes: Sequence[PromptStatistics]
    shared_FF: Tensor
    scale_F: Tensor
    shrinkage: float

    def blended(self, number: int) -> Tensor:
        """Returns a class's covariance blended with that of all (F, F)."""
        return blended(self.classes[number], self.shared_FF, PRIOR * len(self.scale_F))

    def factorise(self, number: int, beside: int | None) -> tuple[Tensor, float, float]:
        """Returns a class's Cholesky factor (F, F), its nu, and what its score has beside the distance."""
        statistics, width = self.classes[number], len(self.scale_F)
        if beside is None:
            prior, blended_FF = PRIOR * width, self.blended(number)
        else:
            prior = LIKENESS * width
            blended_FF = blended(statistics, self.blended(beside), prior)
        factor_FF = shrunk_cholesky(blended_FF, self.scale_F, self.shrinkage) * math.sqrt(
            1 + 1 / statistics.independent
        )
        nu = statistics.independent + prior
        constant = math.lgamma((nu + width) / 2) - math.lgamma(nu / 2) - width / 2 * math.log(nu)
        return factor_FF, nu, constant - float(factor_FF.diagonal().log().sum())


class Gaussians:
    """Classes with covariances of their own, blended with that of all."""

    def __init__(self, classes: Sequence[PromptStatistics], *, shrinkage: float) -> None:
        self.classes, self.shrinkage = list(classes), shrinkage
        self.weight_CF, self.bias_C, self.shared_FF, self.scale_F = _shared(self.classes, shrinkage)
        covariances = _Covariances(self.classes, self.shared_FF, self.scale_F, shrinkage)
        # Not a method of this object: it would hold itself, and its factors, until the garbage collector comes.
        self._factor = lru_cache(maxsize=FACTORS)(covariances.factorise)

    def linear(self, x_BF: Tensor) -> Tensor:
        """Returns the scores by the shared covariance alone (B, C), float64."""
        return x_BF.double() @ self.weight_CF.T + self.bias_C

    def scores(self, x_BF: Tensor, scored_BC: Tensor) -> Tensor:
        """Returns the scores (B, C), float64, of the classes that the mask asks for; the others have -inf."""
        return self._scores(x_BF.double(), scored_BC, None)

    def beside(self, x_BF: Tensor, beside_B: Tensor, scored_BC: Tensor) -> Tensor:
        """Returns the same (B, C) with the covariance of each prompt's class `beside_B` as the prior of the others."""
        x_BF = x_BF.double()
        scores_BC = torch.full(scored_BC.shape, -torch.inf, dtype=torch.float64)
        for number in beside_B.unique().tolist():
            rows_B = beside_B == number
            scores_BC[rows_B] = self._scores(x_BF[rows_B], scored_BC[rows_B], number)
        return scores_BC

    def _scores(self, x_BF: Tensor, scored_BC: Tensor, beside: int | None) -> Tensor:
        scores_BC = torch.full(scored_BC.shape, -torch.inf, dtype=torch.float64)
        for number in scored_BC.any(0).nonzero().squeeze(-1).tolist():
            rows_B = scored_BC[:, number]
            factor_FF, nu, constant = self._factor(number, beside)
            centred_BF = (x_BF[rows_B] - self.classes[number].mean_F) / self.scale_F
            distance_B = torch.linalg.solve_triangular(factor_FF, centred_BF.T, upper=False).square().sum(0)
            scores_BC[rows_B, number] = constant - (nu + len(self.scale_F)) / 2 * torch.log1p(distance_B / nu)
        return scores_BC


def blended(statistics: PromptStatistics, prior_FF: Tensor, weight: float) -> Tensor:
    """Returns a class's covariance (F, F) with a prior worth `weight` prompts."""
    scatter_FF = statistics.scatter_FF * (statistics.independent / statistics.count)
    return (scatter_FF + weight * prior_FF) / (statistics.independent + weight)


def solve(classes: Sequence[PromptStatistics], *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Returns weights (C, F) and biases (C,), float64: scores are log-likelihoods up to a constant of the sample."""
    weight_CF, bias_C, _, _ = _shared(classes, shrinkage)
    return weight_CF, bias_C


def _shared(classes: Sequence[PromptStatistics], shrinkage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns weights, biases, the shared covariance (F, F), and the standard deviations of all together (F,).

    With one covariance for all classes, the quadratic term of the Gaussians is the same for all: scores are linear, <x, w> + b.
    The means are centred and scaled first: raw features are far from zero, and their products would lose digits.
    """
    total = sum(classes[1:], start=classes[0])
    within_FF = torch.zeros_like(total.scatter_FF)
    for c in classes:
        within_FF += c.scatter_FF
    shared_FF, scale_F = within_FF / total.count, total.scale_F(1e-6)
    factor_FF = shrunk_cholesky(shared_FF, scale_F, shrinkage)
    means_CF = torch.stack([c.mean_F for c in classes])
    centre_F = means_CF.mean(0)
    relative_CF = (means_CF - centre_F) / scale_F
    directions_CF = torch.cholesky_solve(relative_CF.T, factor_FF).T
    weight_CF = directions_CF / scale_F
    bias_C = -0.5 * (relative_CF * directions_CF).sum(-1) - weight_CF @ centre_F
    return weight_CF, bias_C, shared_FF, scale_F
