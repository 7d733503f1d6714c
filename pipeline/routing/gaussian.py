"""The closed-form classifier that all routing rests on: Gaussians with one covariance, solved from summed statistics.

    Sigma = sum_c scatter_c / sum_c count_c           C = (1 - a) S^-1 Sigma S^-1 + a I,   S = sqrt(diag Sigma_total)
    score_c(x) = <x, w_c> + b_c                       w_c = S^-1 C^-1 S^-1 m_c,  b_c = -<m_c, w_c> / 2,  equal priors

Only sums enter: the order of the classes does not matter, the result equals that of all samples together, and a class is
forgotten exactly by leaving its term out. Shapes: F features, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky


def solve(classes: Sequence[PromptStatistics], *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Returns weights (C, F) and biases (C,), float64: scores are log-likelihoods up to a constant of the sample."""
    total = sum(classes[1:], start=classes[0])
    within_FF = torch.zeros_like(total.scatter_FF)
    for c in classes:
        within_FF += c.scatter_FF
    scale_F = total.scale_F(1e-6)
    factor_FF = shrunk_cholesky(within_FF / total.count, scale_F, shrinkage)
    means_CF = torch.stack([c.mean_F for c in classes])
    centre_F = means_CF.mean(0)
    relative_CF = (means_CF - centre_F) / scale_F
    directions_CF = torch.cholesky_solve(relative_CF.T, factor_FF).T
    weight_CF = directions_CF / scale_F
    return weight_CF, -0.5 * (relative_CF * directions_CF).sum(-1) - weight_CF @ centre_F
