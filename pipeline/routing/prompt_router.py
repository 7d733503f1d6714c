"""The prompt router: one decision a prompt, in closed form.

Every class (each expert, and the null expert for general prompts) is a Gaussian with its own mean and one covariance
shared by all, solved from summed statistics:

    Sigma = sum_c scatter_c / sum_c count_c           C = (1 - a) S^-1 Sigma S^-1 + a I,   S = sqrt(diag Sigma_total)
    score_c(x) = <x, w_c> - <m_c, w_c> / 2            w_c = S^-1 C^-1 S^-1 m_c,   equal priors

Only sums enter, so the router is the same in whatever order the tasks came, equals the one trained on all tasks' prompts
together, and forgets an expert exactly when its term is left out. Without a null expert it abstains: a prompt that lies
outside every task's own radius goes to the base. Shapes: B prompts, F features, C classes, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky


class PromptRouter:
    """Chooses one expert, or the base, for every prompt."""

    def __init__(
        self, experts: Sequence[PromptStatistics], null: PromptStatistics | None, *, shrinkage: float = 0.05
    ) -> None:
        self.experts = list(experts)
        self.null = null
        self.shrinkage = shrinkage
        if not self.experts:
            return
        classes = [*self.experts, *([null] if null else [])]
        total = sum(classes[1:], start=classes[0])
        means_CF = torch.stack([c.mean_F for c in classes])
        within_FF = torch.stack([c.scatter_FF for c in classes]).sum(0) / total.count
        scale_F = total.scale_F(1e-6)
        factor_FF = shrunk_cholesky(within_FF, scale_F, shrinkage)
        centre_F = means_CF.mean(0)
        relative_CF = (means_CF - centre_F) / scale_F
        directions_CF = torch.cholesky_solve(relative_CF.T, factor_FF).T
        self.weight_CF = directions_CF / scale_F
        self.bias_C = -0.5 * (relative_CF * directions_CF).sum(-1) - self.weight_CF @ centre_F

    def scores(self, features_BF: Tensor) -> Tensor:
        """Returns the log-likelihood of every class up to a constant (B, C): the experts, then the null expert."""
        return features_BF.double().cpu() @ self.weight_CF.T + self.bias_C

    def weights(self, features_BF: Tensor) -> Tensor:
        """Returns the mixing weights (B, E): one-hot, or all zero where the base answers."""
        count = len(self.experts)
        weights_BE = torch.zeros(len(features_BF), count)
        if count == 0:
            return weights_BE
        scores_BC = self.scores(features_BF)
        if self.null is None:
            inside_BE = torch.stack(
                [s.distance(features_BF.cpu(), shrinkage=self.shrinkage) <= s.radius for s in self.experts], dim=-1
            )
            scores_BC = scores_BC.masked_fill(~inside_BE, -torch.inf)
            answered_B = inside_BE.any(-1)
        else:
            answered_B = scores_BC.argmax(-1) < count
        chosen_B = scores_BC[:, :count].argmax(-1)
        weights_BE[torch.arange(len(features_BF)), chosen_B] = answered_B.float()
        return weights_BE
