"""The closed-form classifiers that all routing rests on: Gaussians solved from summed statistics. Equal priors.

One covariance for all (`solve`, for the Linears: linear, so it costs F for each class; `MeanIndex`, for the first selection of
classes, has the same as distances):

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

Only sums enter (`pooled`): the order of the classes does not matter, the result equals that of all samples together, and a
class comes, or is forgotten, by its own terms alone. Shapes: B prompts, F features, C classes, L of them listed per prompt.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.routing.features import text_width
from pipeline.routing.mean_index import MeanIndex
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky

PRIOR = 0.4
"""Prompts that the shared covariance is worth, per feature."""
LIKENESS = 2
"""Prompts that the covariance of a class beside it is worth, per feature. Less costs tasks prompts that are theirs, more
costs the base those that are its own (measured at F = 384 and 128 on four streams of look-alikes)."""
FACTOR_BYTES, FEWEST_FACTORS = 2**28, 32
"""Memory of the factors that are kept, those asked for last (2 MB each at F = 512), and how many are kept at least."""
BATCH_BYTES, STACK_BYTES = 2**25, 2**22
"""Memory of the factors that are computed at once, and of those that are worth copying to be used at once."""


Part = tuple[int, int]
"""First feature, and the one after the last, of a part of all: a score of them alone is the marginal of the distribution."""


@dataclass(frozen=True)
class _Factor:
    """What a class's score needs."""

    factor_FF: Tensor
    """Lower Cholesky factor of its covariance."""
    nu: float
    constant: float
    """What the score has beside the distance."""

    @classmethod
    def of(cls, factor_FF: Tensor, nu: float) -> "_Factor":
        """Computes the constant."""
        half, width = nu / 2, len(factor_FF)
        constant = math.lgamma(half + width / 2) - math.lgamma(half) - width / 2 * math.log(nu)
        return cls(factor_FF, nu, constant - float(factor_FF.diagonal().log().sum()))


class _Factors:
    """The factors of classes, each blended with the covariance of all, or with that of a class beside it; the last are kept.

    Of all features, or of a part of them: the covariance of a marginal is that part of the covariance.
    """

    def __init__(
        self, classes: Sequence[PromptStatistics], pooled: PooledStatistics, shrinkage: float, part: Part | None
    ) -> None:
        self._classes, self._shrinkage = classes, shrinkage
        self._pooled, self._all = pooled, len(pooled.mean_F)
        self.taken = slice(*(part or (0, self._all)))
        """The features that these are of."""
        self._width = self.taken.stop - self.taken.start
        self._kept: dict[tuple[int, int | None], _Factor] = {}
        self._lock = threading.Lock()

    @cached_property
    def scale_F(self) -> Tensor:
        """Standard deviation of each feature."""
        return self._pooled.scale_F[self.taken]

    @cached_property
    def _shared_FF(self) -> Tensor:
        return self._pooled.covariance_FF[self.taken, self.taken]

    @property
    def at_once(self) -> int:
        """How many are to be asked for at once."""
        return max(1, BATCH_BYTES // (8 * self._width**2))

    @property
    def stacked_at_once(self) -> int:
        """How many may be copied into one tensor."""
        return STACK_BYTES // (8 * self._width**2)

    def of(self, numbers: Sequence[int], beside: int | None) -> list[_Factor]:
        """Returns the factors of classes."""
        with self._lock:
            found = {number: self._kept.pop((number, beside), None) for number in numbers}
        if missing := [number for number, factor in found.items() if factor is None]:
            found |= zip(missing, self._factorise(missing, beside), strict=True)
        factors = {number: factor for number, factor in found.items() if factor is not None}
        with self._lock:
            self._kept |= {(number, beside): factor for number, factor in factors.items()}
            for key in list(self._kept)[: -max(FEWEST_FACTORS, FACTOR_BYTES // (8 * self._width**2))]:
                del self._kept[key]
        return [factors[number] for number in numbers]

    def _blended(self, numbers: Sequence[int], prior_FF: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Returns the covariances of classes with a prior worth `weight` prompts (N, F, F), and their own prompts (N,)."""
        classes = [self._classes[number] for number in numbers]
        count_N = torch.tensor([float(c.independent) for c in classes], dtype=torch.float64)
        scatters = (c.scatter_FF[self.taken, self.taken] * (c.independent / c.count) for c in classes)
        scatter_NFF = torch.stack(list(scatters))
        blended_NFF = scatter_NFF.add_(prior_FF, alpha=weight).div_((count_N + weight)[:, None, None])
        return blended_NFF, count_N

    def _factorise(self, numbers: Sequence[int], beside: int | None) -> list[_Factor]:
        prior, prior_FF = PRIOR * self._all, self._shared_FF
        if beside is not None:
            ((prior_FF,), _), prior = self._blended([beside], prior_FF, prior), LIKENESS * self._all
        blended_NFF, count_N = self._blended(numbers, prior_FF, prior)
        factor_NFF = shrunk_cholesky(blended_NFF, self.scale_F, self._shrinkage)
        factor_NFF *= (1 + 1 / count_N).sqrt()[:, None, None]
        # Each in memory of its own, which is free when it is not kept any more.
        factors = [factor_NFF[0]] if len(numbers) == 1 else [factor_FF.clone() for factor_FF in factor_NFF]
        return [_Factor.of(*row) for row in zip(factors, (count_N + prior).tolist(), strict=True)]


class Gaussians:
    """Classes with covariances of their own, blended with that of all. One that comes or goes makes others of the kind."""

    def __init__(
        self, classes: Sequence[PromptStatistics], *, shrinkage: float, pooled: PooledStatistics | None = None
    ) -> None:
        """`pooled` are the sums of the classes, where somebody has them."""
        self.classes, self.shrinkage = list(classes), shrinkage
        self.pooled = pooled or PooledStatistics.of(self.classes)
        self._factors: dict[Part | None, _Factors] = {}

    def insert(self, position: int, statistics: PromptStatistics) -> "Gaussians":
        """Returns the classes with one more, at the price of that one."""
        classes = [*self.classes[:position], statistics, *self.classes[position:]]
        return Gaussians(classes, shrinkage=self.shrinkage, pooled=self.pooled + statistics)

    def remove(self, position: int) -> "Gaussians":
        """Returns the classes without one, which is not the last, at the price of that one."""
        classes = [*self.classes[:position], *self.classes[position + 1 :]]
        return Gaussians(classes, shrinkage=self.shrinkage, pooled=self.pooled - self.classes[position])

    @cached_property
    def index(self) -> MeanIndex:
        """The means of all classes, to select by."""
        return MeanIndex.of(self.classes, self.pooled, shrinkage=self.shrinkage)

    @cached_property
    def text_index(self) -> MeanIndex:
        """The same of the text alone."""
        return self.index.leading(text_width(len(self.pooled.mean_F)))

    @cached_property
    def never_with_image_C(self) -> Tensor:
        """Whether no prompt of each class had an image (C,), bool; False where it is not known."""
        return torch.tensor([c.with_image == 0 for c in self.classes])

    @cached_property
    def always_with_image_C(self) -> Tensor:
        """Whether every prompt of each class had an image (C,), bool; False where it is not known."""
        return torch.tensor([c.with_image == c.count for c in self.classes])

    def release(self) -> None:
        """Lets go of the factors."""
        self._factors = {}

    def scores(self, x_BF: Tensor, classes_BL: Tensor, *, part: Part | None = None) -> Tensor:
        """Returns the scores of each prompt's classes (B, L), float64; of a part of the features, where it is given."""
        return self._scores(x_BF.double(), classes_BL, None, part)

    def beside(self, x_BF: Tensor, beside_B: Tensor, classes_BL: Tensor) -> Tensor:
        """Returns the same (B, L) with the covariance of each prompt's class `beside_B` as the prior of the others."""
        scores_BL = torch.empty(classes_BL.shape, dtype=torch.float64)
        for number, (rows, _) in grouped(beside_B[:, None]):
            scores_BL[rows] = self._scores(x_BF[rows].double(), classes_BL[rows], number)
        return scores_BL

    def _scores(self, x_BF: Tensor, classes_BL: Tensor, beside: int | None, part: Part | None = None) -> Tensor:
        scores_BL = torch.empty(classes_BL.shape, dtype=torch.float64)
        factors = self._factors.setdefault(part, _Factors(self.classes, self.pooled, self.shrinkage, part))
        groups, taken, scale_F = list(grouped(classes_BL)), factors.taken, factors.scale_F
        x_BF = x_BF[:, taken]
        for start in range(0, len(groups), factors.at_once):
            batch = groups[start : start + factors.at_once]
            found = factors.of([number for number, _ in batch], beside)
            if classes_BL.shape[0] == 1 and len(batch) <= factors.stacked_at_once:  # a prompt that decodes waits for it
                places = torch.cat([places for _, (_, places) in batch])
                means_LF = torch.stack([self.classes[number].mean_F[taken] for number, _ in batch])
                scores_BL[0, places] = _scores_of_one((x_BF - means_LF) / scale_F, found)
                continue
            for (number, (rows, places)), factor in zip(batch, found, strict=True):
                centred_NF = (x_BF[rows] - self.classes[number].mean_F[taken]) / scale_F
                white_FN = torch.linalg.solve_triangular(factor.factor_FF, centred_NF.T, upper=False)
                tail_N = torch.log1p(white_FN.square().sum(0) / factor.nu)
                scores_BL[rows, places] = factor.constant - (factor.nu + len(scale_F)) / 2 * tail_N
        return scores_BL


def _scores_of_one(centred_LF: Tensor, factors: Sequence[_Factor]) -> Tensor:
    """Returns the scores of one prompt in classes (L,): the same in few operations instead of many small ones."""
    factor_LFF = torch.stack([factor.factor_FF for factor in factors])
    distance_L = torch.linalg.solve_triangular(factor_LFF, centred_LF.unsqueeze(-1), upper=False).square().sum((1, 2))
    nu_L, constant_L = torch.tensor([(f.nu, f.constant) for f in factors], dtype=torch.float64).T
    return constant_L - (nu_L + centred_LF.shape[-1]) / 2 * torch.log1p(distance_L / nu_L)


def grouped(numbers_BL: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Yields each number with the rows and the places where it stands."""
    numbers_P, order_P = numbers_BL.flatten().sort(stable=True)
    numbers, counts = numbers_P.unique_consecutive(return_counts=True)
    for number, at_N in zip(numbers.tolist(), order_P.split(counts.tolist()), strict=True):
        yield number, (at_N // numbers_BL.shape[-1], at_N % numbers_BL.shape[-1])


def solve(classes: Sequence[PromptStatistics], *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Returns weights (C, F) and biases (C,), float64: scores are log-likelihoods up to a constant of the sample.

    With one covariance for all classes, the quadratic term of the Gaussians is the same for all: scores are linear, <x, w> + b.
    The means are centred and scaled first: raw features are far from zero, and their products would lose digits.
    """
    pooled = PooledStatistics.of(classes)
    scale_F = pooled.scale_F
    factor_FF = shrunk_cholesky(pooled.covariance_FF, scale_F, shrinkage)
    means_CF = torch.stack([c.mean_F for c in classes])
    centre_F = means_CF.mean(0)
    relative_CF = (means_CF - centre_F) / scale_F
    directions_CF = torch.cholesky_solve(relative_CF.T, factor_FF).T
    weight_CF = directions_CF / scale_F
    return weight_CF, -0.5 * (relative_CF * directions_CF).sum(-1) - weight_CF @ centre_F
