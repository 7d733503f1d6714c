"""What all classes together are to the prompt router: sums, so that a class comes and goes in one step.

Of N prompts of all classes: their number, their mean, the sum of squares about it (of each feature), and the sum of the
classes' own scatters. A class that comes adds its terms, one that goes takes them away; sums in another order differ by
rounding alone (1e-12 of the values). Shapes: F features; float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.routing.statistics import PromptStatistics, scale

FLOOR = 1e-6
"""Share of the mean variance that is added to every feature's variance."""


@dataclass(frozen=True, eq=False)
class PooledStatistics:
    """Sums over classes."""

    count: int
    """Number of prompts N."""
    mean_F: Tensor
    """Mean of all of them (F,)."""
    squares_F: Tensor
    """Sum of squares about it (F,)."""
    scatter_FF: Tensor
    """Sum of the classes' scatters (F, F), each about its own mean."""

    @classmethod
    def of(cls, classes: Iterable[PromptStatistics]) -> "PooledStatistics":
        """Sums the terms of classes; raises ValueError where there is none."""
        count, mean_F, squares_F, scatter_FF = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)
        for c in classes:
            own_FF = c.scatter_FF
            if count == 0:
                mean_F, squares_F, scatter_FF = c.mean_F, own_FF.diagonal().clone(), own_FF.clone()
            else:
                mean_F, squares_F = _joined(count, mean_F, squares_F, c, own_FF)
                scatter_FF += own_FF
            count += c.count
        if count == 0:
            raise ValueError("no class to sum")
        return cls(count, mean_F, squares_F, scatter_FF)

    def __add__(self, other: PromptStatistics) -> "PooledStatistics":
        """The sums with one class more."""
        own_FF = other.scatter_FF
        mean_F, squares_F = _joined(self.count, self.mean_F, self.squares_F, other, own_FF)
        return PooledStatistics(self.count + other.count, mean_F, squares_F, self.scatter_FF + own_FF)

    def __sub__(self, other: PromptStatistics) -> "PooledStatistics":
        """The sums without one class, which is in them, and is not the last."""
        count, own_FF = self.count - other.count, other.scatter_FF
        mean_F = (self.count * self.mean_F - other.count * other.mean_F) / count
        between_F = (other.mean_F - mean_F).square() * (count * other.count / self.count)
        squares_F = (self.squares_F - own_FF.diagonal() - between_F).clamp(min=0)
        return PooledStatistics(count, mean_F, squares_F, self.scatter_FF - own_FF)

    @property
    def scale_F(self) -> Tensor:
        """Standard deviation of each feature, of all prompts together (F,)."""
        return scale(self.squares_F / self.count, self.mean_F, FLOOR)

    @property
    def covariance_FF(self) -> Tensor:
        """Covariance that the classes share (F, F)."""
        return self.scatter_FF / self.count


def _joined(
    count: int, mean_F: Tensor, squares_F: Tensor, other: PromptStatistics, own_FF: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns mean and sum of squares (F,) with those of one class more."""
    total = count + other.count
    between_F = (other.mean_F - mean_F).square() * (count * other.count / total)
    return (count * mean_F + other.count * other.mean_F) / total, squares_F + own_FF.diagonal() + between_F
