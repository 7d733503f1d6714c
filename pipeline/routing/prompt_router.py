"""The prompt router: one decision a prompt, in closed form.

Every class (each expert, and the null expert for general prompts) is a Gaussian over the prompt features, with its own
mean and one covariance shared by all (`gaussian`). So the router is the same in whatever order the tasks came, equals the
one trained on all tasks' prompts together, and forgets an expert exactly when its term is left out. Without a null expert
it abstains: a prompt that lies outside the own radius of each of its likeliest tasks goes to the base. Shapes: B prompts,
F features, C classes, E experts, M places on a short list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.routing.gaussian import solve
from pipeline.routing.route import NOBODY, Base, Fixed, Route
from pipeline.routing.statistics import PromptStatistics

CANDIDATES = 8
"""Without a null expert: how many of the likeliest experts are asked whether a prompt lies within their radius."""


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
        self.weight_CF, self.bias_C = solve(classes, shrinkage=shrinkage)

    def scores(self, features_BF: Tensor) -> Tensor:
        """Returns the log-likelihood of every class up to a constant (B, C): the experts, then the null expert."""
        return features_BF.double().cpu() @ self.weight_CF.T + self.bias_C

    def short_list(self, features_BF: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Returns the likeliest experts of every prompt (B, M), NOBODY among them, and their log-posterior (B, M).

        In falling order; M is `places`, or less where there are fewer classes.
        """
        count = len(self.experts)
        if count == 0:
            return torch.full((len(features_BF), 1), NOBODY), torch.zeros(len(features_BF), 1, dtype=torch.float64)
        scores_BC = self.scores(features_BF)
        if self.null is None:
            scores_BC = self._abstaining(scores_BC, features_BF.cpu())
        posterior_BC = scores_BC.log_softmax(-1)
        best_BM, classes_BM = posterior_BC.topk(min(places, posterior_BC.shape[-1]), dim=-1)
        return torch.where(classes_BM == count, NOBODY, classes_BM), best_BM

    def _abstaining(self, scores_BC: Tensor, features_BF: Tensor) -> Tensor:
        """Rules out experts whose radius a prompt exceeds, and adds NOBODY as the class that is left when all are."""
        allowed_BE = torch.full_like(scores_BC, -torch.inf)
        nearest_BK = scores_BC.topk(min(CANDIDATES, scores_BC.shape[-1]), dim=-1).indices
        for expert in nearest_BK.unique().tolist():
            rows = (nearest_BK == expert).any(-1).nonzero().squeeze(-1)
            statistics = self.experts[expert]
            inside = statistics.distance(features_BF[rows], shrinkage=self.shrinkage) <= statistics.radius
            allowed_BE[rows[inside], expert] = scores_BC[rows[inside], expert]
        nobody_B1 = torch.where(allowed_BE.isinf().all(-1, keepdim=True), 0.0, -torch.inf).to(scores_BC)
        return torch.cat([allowed_BE, nobody_B1], dim=-1)

    def route(self, features_BF: Tensor) -> Route:
        """Sends every prompt to its likeliest expert, or to the base."""
        experts_B1, _ = self.short_list(features_BF, 1)
        return fixed(experts_B1, torch.ones(experts_B1.shape), features_BF.device)


def fixed(experts_BM: Tensor, weights_BM: Tensor, device: torch.device) -> Route:
    """Returns the route with these weights; in its cheap forms where nobody takes part, or all rows agree."""
    if (experts_BM == NOBODY).all():
        return Base()
    if len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all() and (weights_BM == weights_BM[0]).all():
        experts_BM, weights_BM = experts_BM[:1], weights_BM[:1]
    return Fixed(experts_BM.to(device), weights_BM.to(device))
