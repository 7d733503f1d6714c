"""Sufficient statistics of a task's prompts: all that the prompt router ever needs of a task's data.

Count, mean and scatter of the prompt features. They combine: statistics of two sets of prompts are the sum of theirs, in
any order, and taking a task out is leaving its term out. Relatives: ACIL (arXiv 2205.14922), RanPAC (arXiv 2307.02251).
Shapes: N prompts, F features; float64, so that sums do not depend on their order visibly.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


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

        The radius is measured crosswise (each half against the other half's mean and covariance): distances of the very
        prompts that made a covariance are too small.
        """
        features_NF = features_NF.double()
        mean_F = features_NF.mean(0)
        centred_NF = features_NF - mean_F
        whole = cls(len(features_NF), mean_F, centred_NF.T @ centred_NF)
        if quantile is None:
            return whole
        if len(features_NF) < 4:
            raise ValueError(f"{len(features_NF)} prompts are too few to calibrate a radius; at least 4 are needed")
        halves = features_NF[0::2], features_NF[1::2]
        distances = [cls.of(one).distance(other, shrinkage=shrinkage) for one, other in (halves, halves[::-1])]
        radius = float(torch.quantile(torch.cat(distances), quantile))
        return cls(whole.count, whole.mean_F, whole.scatter_FF, radius)

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
