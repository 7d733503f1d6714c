"""Sufficient statistics of a task's prompts: all that the prompt router ever needs of a task's data.

Count, mean and scatter of the prompt features. They combine: statistics of two sets of prompts are the sum of theirs, in
any order, and taking a task out is leaving its term out. Relatives: ACIL (arXiv 2205.14922), RanPAC (arXiv 2307.02251).
Shapes: N prompts, F features; float64, so that sums do not depend on their order visibly.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

FOLDS = 10
"""Parts of a task's prompts that are measured against all others: what is measured has nearly all of the prompts."""
SAME = 1e-5
"""Prompts that differ by less than this share of their spread are the same one, read again."""
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
    scatter_FF: Tensor
    """Sum of outer products of the centred features (F, F)."""
    radius: float = float("inf")
    """Squared own distance that only a small share of the task's own prompts exceeds; infinite without calibration."""

    @classmethod
    def of(cls, features_NF: Tensor, *, quantile: float | None = None, shrinkage: float = 0.05) -> "PromptStatistics":
        """Summarises features (N, F); with `quantile`, also calibrates the radius.

        The radius is measured crosswise, each fold of the prompts against the mean and covariance of all others: distances
        of the very prompts that made a covariance are too small. The same prompt several times lies in one fold, and its
        distance counts once.
        """
        features_NF = features_NF.double()
        mean_F = features_NF.mean(0)
        centred_NF = features_NF - mean_F
        whole = cls(len(features_NF), mean_F, centred_NF.T @ centred_NF)
        if quantile is None:
            return whole
        if len(features_NF) < 4:
            raise ValueError(f"{len(features_NF)} prompts are too few to calibrate a radius; at least 4 are needed")
        group_N = _groups(features_NF)
        count = int(group_N.max()) + 1
        distance_N = whole.distance(features_NF, shrinkage=shrinkage)
        if count >= 4:
            # Neighbours along the direction of the groups lie in different folds.
            fold_N = group_N % min(FOLDS, count)
            for fold in range(min(FOLDS, count)):
                held_N = fold_N == fold
                others = cls.of(features_NF[~held_N])
                distance_N[held_N] = others.distance(features_NF[held_N], shrinkage=shrinkage)
        distances_G = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, group_N, distance_N, "amax")
        return cls(whole.count, whole.mean_F, whole.scatter_FF, _bound(distances_G, quantile))

    def __add__(self, other: "PromptStatistics") -> "PromptStatistics":
        """Statistics of both sets of prompts together (without a radius: that belongs to one task)."""
        count = self.count + other.count
        apart_F = other.mean_F - self.mean_F
        between_FF = torch.outer(apart_F, apart_F) * (self.count * other.count / count)
        mean_F = (self.count * self.mean_F + other.count * other.mean_F) / count
        return PromptStatistics(count, mean_F, self.scatter_FF + other.scatter_FF + between_FF)

    @property
    def width(self) -> int:
        """Number of features F."""
        return len(self.mean_F)

    def scale_F(self, floor: float) -> Tensor:
        """Returns each feature's standard deviation (F,), with `floor` times the mean variance added to every variance.

        The last term exceeds what rounding leaves of a variance that is zero: prompts may all be the same.
        """
        variance_F = self.scatter_FF.diagonal() / self.count
        return (variance_F + floor * variance_F.mean() + 1e-12 * (1 + self.mean_F.square())).sqrt()

    def distance(self, features_NF: Tensor, *, shrinkage: float = 0.05) -> Tensor:
        """Returns each prompt's squared Mahalanobis distance (N,) from this task, per feature.

        Covariance of this task alone, standardised, with weight `shrinkage` on the identity. Features that never vary
        here (the image part of a text-only task) keep a small variance: prompts in which they differ are far away.
        """
        scale_F, factor_FF = _own_factor(self, shrinkage)
        centred_NF = (features_NF.double() - self.mean_F) / scale_F
        white_FN = torch.linalg.solve_triangular(factor_FF, centred_NF.T, upper=False)
        return white_FN.square().mean(0)


def _groups(features_NF: Tensor) -> Tensor:
    """Returns a number for each prompt (N,), 0 to G - 1, that it shares with its repetitions.

    Repetitions differ by rounding, since padding differs; so they are neighbours along any one direction. Different
    prompts may be, too, by chance: then they only share a fold.
    """
    direction_F = torch.randn(features_NF.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    along_N = (features_NF - features_NF.mean(0)) @ direction_F
    sorted_N, order_N = along_N.sort()
    gap_N = SAME * along_N.std() + 1e-6 * features_NF.abs().max()
    number_N = torch.zeros(len(along_N), dtype=torch.long)
    number_N[order_N[1:]] = (sorted_N.diff() > gap_N).cumsum(0)
    return number_N


def _bound(distances_G: Tensor, quantile: float) -> float:
    """Returns a bound that a new distance exceeds with a probability of about 1 - `quantile`, or less.

    Of many distances it is their own quantile, the k-th of G in rising order with k = ceil((G + 1) quantile), as in
    conformal prediction. Few do not reach that far into the tail, or only by chance: then it is the upper tolerance bound
    of a normal distribution of their logarithms (mean + (z + c sqrt(1 / G + z^2 / (2 G))) deviation), where that is larger.
    """
    count = len(distances_G)
    rank = math.ceil((count + 1) * quantile)
    own = float(distances_G.sort().values[min(rank, count) - 1])
    z = NormalDist().inv_cdf(quantile)
    exceeding = (1 - quantile) * count  # prompts that the estimate rests on
    if count < 4 or exceeding >= ENOUGH:
        return own
    logarithms_G = distances_G.clamp(min=1e-12).log()
    factor = z + CONFIDENCE * math.sqrt(1 / count + z * z / (2 * count))
    return max(own, math.exp(float(logarithms_G.mean() + factor * logarithms_G.std())))


@lru_cache(maxsize=128)
def _own_factor(statistics: PromptStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Factorises a task's own covariance; kept for the tasks that were asked for last (2 MB each at F = 512)."""
    scale_F = statistics.scale_F(1e-3)
    return scale_F, shrunk_cholesky(statistics.scatter_FF / statistics.count, scale_F, shrinkage)


def shrunk_cholesky(covariance_FF: Tensor, scale_F: Tensor, shrinkage: float) -> Tensor:
    """Returns the lower Cholesky factor (F, F) of (1 - shrinkage) C + shrinkage I, C the covariance in units of `scale_F`."""
    standard_FF = covariance_FF / scale_F / scale_F.unsqueeze(-1)
    standard_FF = (1 - shrinkage) * standard_FF
    standard_FF.diagonal().add_(shrinkage)
    return torch.linalg.cholesky(standard_FF)
