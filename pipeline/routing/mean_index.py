"""Which classes a prompt lies near: squared distances from all of their means by the covariance that they share.

    d_c(x)^2 = |L^-1 S^-1 (x - m_c)|^2        L L^T = C = (1 - s) S^-1 Sigma S^-1 + s I     (`gaussian` has the letters)

Shapes: B prompts, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky


@dataclass(frozen=True, eq=False)
class MeanIndex:
    """The whitened means of classes, in their order."""

    centre_F: Tensor
    """A point near the means, float64: raw features are far from zero, and their products would lose digits."""
    scale_F: Tensor
    factor_FF: Tensor
    means_CF: Tensor
    """Whitened means, float32: they only select, and all of them are read for every prompt."""
    squares_C: Tensor
    """Their squared lengths."""

    @classmethod
    def of(cls, classes: Sequence[PromptStatistics], pooled: PooledStatistics, *, shrinkage: float) -> "MeanIndex":
        """Whitens the means of all classes."""
        scale_F = pooled.scale_F
        factor_FF = shrunk_cholesky(pooled.covariance_FF, scale_F, shrinkage)
        means_CF = torch.stack([c.mean_F for c in classes])
        centre_F = means_CF.mean(0)
        white_CF = _whitened(means_CF, centre_F, scale_F, factor_FF)
        return cls(centre_F, scale_F, factor_FF, white_CF, white_CF.square().sum(-1))

    def distances(self, x_BF: Tensor) -> Tensor:
        """Returns each prompt's distance from every class (B, C), float32."""
        white_BF = _whitened(x_BF, self.centre_F, self.scale_F, self.factor_FF)
        squares_B1 = white_BF.square().sum(-1, keepdim=True)
        return torch.addmm(squares_B1 + self.squares_C, white_BF, self.means_CF.T, alpha=-2)

    def leading(self, count: int) -> "MeanIndex":
        """Returns the index of the first features alone: the factor is lower triangular, so they depend on no other."""
        means_CP = self.means_CF[:, :count].contiguous()
        squares_C = means_CP.square().sum(-1)
        return MeanIndex(
            self.centre_F[:count], self.scale_F[:count], self.factor_FF[:count, :count], means_CP, squares_C
        )


def _whitened(x_NF: Tensor, centre_F: Tensor, scale_F: Tensor, factor_FF: Tensor) -> Tensor:
    standard_NF = (x_NF.double() - centre_F) / scale_F
    return torch.linalg.solve_triangular(factor_FF, standard_NF.T, upper=False).T.contiguous().float()
