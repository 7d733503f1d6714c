"""Sufficient statistics of a task's prompts: all that the prompt router ever needs of a task's data.

Count, mean and scatter of the prompt features. They combine: statistics of two sets of prompts are the sum of theirs, in
any order, and taking a task out is leaving its term out. Relatives: ACIL (arXiv 2205.14922), RanPAC (arXiv 2307.02251).
Shapes: N prompts, F features; float64, so that sums do not depend on their order visibly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from pipeline.routing.features import has_image

FOLDS = 10
"""Parts of a task's prompts that are measured against all others: what is measured has nearly all of the prompts."""
FEWEST = 4
"""Prompts, or images, from which on folds are made of them."""
ENOUGH = 10
"""Distances beyond a quantile from which on it is read off them alone."""
CONFIDENCE = 1.645
"""Standard errors above the estimate at which a quantile of few distances is put: 95 % of the time it then is no less."""


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """Count, mean and scatter of one task's prompt features, and how far its own prompts lie from their mean."""

    count: int
    """Number of prompts N."""
    mean_F: Tensor
    """Mean of the features (F,)."""
    scatter: Tensor | Callable[[], Tensor]
    """Sum of outer products of the centred features (F, F), or what reads it, where it lies in a file."""
    threshold: float = float("inf")
    """Squared own distance that only a small share of the task's own prompts exceeds; infinite without calibration."""
    images: int | None = None
    """Number of distinct images among the prompts (a prompt without one counts as its own); None: as many as prompts."""
    with_image: int | None = None
    """Number of prompts with an image; None: not known."""

    @classmethod
    def of(
        cls,
        features_NF: Tensor,
        ids_N2: Tensor | None = None,
        *,
        quantile: float | None = None,
        shrinkage: float = 0.05,
    ) -> "PromptStatistics":
        """Summarises features (N, F); with `quantile` also calibrates the threshold and counts prompts with an image.

        `ids_N2` (N, 2), int64, say which prompts have the same image, and which are the same (`prompts.ids`); without
        them all differ. The threshold is measured crosswise, each fold of the images against the mean and covariance of all
        others: distances of the very prompts that made a covariance are too small, and so are those of other questions
        about the same image. The same prompt several times counts once.
        """
        features_NF = features_NF.double()
        mean_F = features_NF.mean(0)
        centred_NF = features_NF - mean_F
        image_N, prompt_N = _numbers(features_NF, ids_N2)
        images, prompts = int(image_N.max()) + 1, int(prompt_N.max()) + 1
        statistics = cls(len(features_NF), mean_F, centred_NF.T @ centred_NF, images=images)
        if quantile is None:
            return statistics
        if len(features_NF) < FEWEST:
            raise ValueError(
                f"{len(features_NF)} prompts are too few to calibrate a threshold; at least {FEWEST} are needed"
            )
        # Questions about two or three images tell nothing of others: then prompts must do.
        group_N, groups = (image_N, images) if images >= FEWEST else (prompt_N, prompts)
        distance_N = statistics.distance(features_NF, shrinkage=shrinkage)
        if groups >= FEWEST:
            fold_N = group_N % min(FOLDS, groups)
            for fold in range(min(FOLDS, groups)):
                held_N = fold_N == fold
                others = cls.of(features_NF[~held_N])
                distance_N[held_N] = others.distance(features_NF[held_N], shrinkage=shrinkage)
        distance_P = torch.zeros(prompts, dtype=torch.float64).scatter_reduce(0, prompt_N, distance_N, "amax")
        with_image = int(has_image(features_NF).sum())
        return replace(statistics, threshold=_bound(distance_P, groups, quantile), with_image=with_image)

    def __add__(self, other: "PromptStatistics") -> "PromptStatistics":
        """Statistics of both sets of prompts together (without a threshold: that belongs to one task)."""
        count = self.count + other.count
        apart_F = other.mean_F - self.mean_F
        between_FF = torch.outer(apart_F, apart_F) * (self.count * other.count / count)
        mean_F = (self.count * self.mean_F + other.count * other.mean_F) / count
        scatter_FF = self.scatter_FF + other.scatter_FF + between_FF
        ours, theirs = self.with_image, other.with_image
        with_image = None if ours is None or theirs is None else ours + theirs
        images = self.independent + other.independent
        return PromptStatistics(count, mean_F, scatter_FF, images=images, with_image=with_image)

    @property
    def scatter_FF(self) -> Tensor:
        """Sum of outer products of the centred features (F, F); read anew each time where it lies in a file."""
        return self.scatter if isinstance(self.scatter, Tensor) else self.scatter()

    @property
    def independent(self) -> int:
        """How many prompts of images of their own tell as much as these: as many as there are images."""
        return self.count if self.images is None else self.images

    @property
    def width(self) -> int:
        """Number of features F."""
        return len(self.mean_F)

    def distance(self, features_NF: Tensor, *, shrinkage: float = 0.05) -> Tensor:
        """Returns each prompt's squared Mahalanobis distance (N,) from this task, per feature.

        Covariance of this task alone, standardised, with weight `shrinkage` on the identity. Features that never vary
        here (the image part of a text-only task) keep a small variance: prompts in which they differ are far away.
        """
        scale_F, factor_FF = _own_factor(self, shrinkage)
        centred_NF = (features_NF.double() - self.mean_F) / scale_F
        white_FN = torch.linalg.solve_triangular(factor_FF, centred_NF.T, upper=False)
        return white_FN.square().mean(0)


def _numbers(features_NF: Tensor, ids_N2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the number of each prompt's image and of the prompt itself (N,), from 0: the same in any order of prompts."""
    if ids_N2 is None:
        every_N = torch.arange(len(features_NF))
        return every_N, every_N
    image_N, prompt_N = (ids_N2[:, i].unique(return_inverse=True)[1] for i in (0, 1))
    return image_N, prompt_N


def _bound(distance_P: Tensor, groups: int, quantile: float) -> float:
    """Returns a bound that a new distance exceeds with a probability of about 1 - `quantile`, or less.

    Of many distances it is their own quantile, the k-th of P in rising order with k = ceil((P + 1) quantile), as in
    conformal prediction. Few do not reach that far into the tail, or only by chance: then it is the upper tolerance bound
    of a normal distribution of their logarithms (mean + (z + c sqrt(1 / G + z^2 / (2 G))) deviation), where that is larger.
    G are the `groups` of prompts that are independent of each other.
    """
    rank = math.ceil((len(distance_P) + 1) * quantile)
    bound = float(distance_P.sort().values[min(rank, len(distance_P)) - 1])
    z = NormalDist().inv_cdf(quantile)
    exceeding = (1 - quantile) * groups  # what the estimate rests on
    if groups < FEWEST:
        return max(bound, 1.0)  # of the very prompts that made the covariance, 1 on average
    if exceeding >= ENOUGH:
        return bound
    logarithms_P = distance_P.clamp(min=1e-12).log()
    factor = z + CONFIDENCE * math.sqrt(1 / groups + z * z / (2 * groups))
    return max(bound, math.exp(float(logarithms_P.mean() + factor * logarithms_P.std())))


@lru_cache(maxsize=128)
def _own_factor(statistics: PromptStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Factorises a task's own covariance; kept for the tasks that were asked for last (2 MB each at F = 512)."""
    covariance_FF = statistics.scatter_FF / statistics.count
    scale_F = scale(covariance_FF.diagonal(), statistics.mean_F, 1e-3)
    return scale_F, shrunk_cholesky(covariance_FF, scale_F, shrinkage)


def scale(variance_F: Tensor, mean_F: Tensor, floor: float) -> Tensor:
    """Returns the standard deviation of each feature (F,), with `floor` times the mean variance added to every variance.

    The last term exceeds what rounding leaves of a variance that is zero: prompts may all be the same.
    """
    return (variance_F + floor * variance_F.mean() + 1e-12 * (1 + mean_F.square())).sqrt()


def shrunk_cholesky(covariance_FF: Tensor, scale_F: Tensor, shrinkage: float) -> Tensor:
    """Returns the lower Cholesky factor of (1 - shrinkage) C + shrinkage I, C the covariance in units of `scale_F`.

    Of one covariance (F, F), or of several (..., F, F).
    """
    standard_FF = covariance_FF / scale_F / scale_F.unsqueeze(-1)
    standard_FF = (1 - shrinkage) * standard_FF
    standard_FF.diagonal(dim1=-2, dim2=-1).add_(shrinkage)
    return torch.linalg.cholesky(standard_FF)


@lru_cache(maxsize=4)
def upper_half(width: int) -> tuple[Tensor, Tensor]:
    """Returns rows and columns of the upper half of a matrix (F, F), diagonal included: a symmetric one is all there."""
    row, column = torch.triu_indices(width, width)
    return row, column
