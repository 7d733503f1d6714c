"""The prompt router: one decision per prompt, in closed form.

Every expert is a Gaussian over the prompt features, with its own mean and its own covariance blended with that of all;
base prompts, which belong to the null expert, are several (`gaussian`, `null`). All have equal priors. The null expert's
components, known from few prompts, are scored as classes like the others, then the likeliest as ones that resemble the
prompt's likeliest expert; the better of the two scores counts. A linear score by the shared covariance picks the candidates,
so that the price of the blend does not grow with the pool. The router is the same in whatever order the tasks came, equals
the one trained on all tasks' prompts together, and forgets an expert exactly when its term is left out. Without a null
expert, a prompt beyond the threshold of each of its likeliest experts goes to the base. Shapes:
B prompts, F features, C classes (experts, then the null expert's components), E experts, K components, M candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.routing.gaussian import Gaussians
from pipeline.routing.routes import NULL_EXPERT, BaseOnly, PromptRoute, Route
from pipeline.routing.statistics import PromptStatistics

CANDIDATES = 8
"""How many of the likeliest experts by the linear score, and of the null expert's components, are scored in full; without a
null expert, how many of the likeliest experts are asked whether a prompt lies within their threshold."""
BESIDE = 2
"""How many of the null expert's likeliest components are scored beside the likeliest expert."""


class PromptRouter:
    """Chooses one expert, or the base, for every prompt."""

    def __init__(
        self,
        experts: Sequence[PromptStatistics],
        null: Sequence[PromptStatistics] = (),
        *,
        shrinkage: float = 0.05,
        retired: Sequence[int] = (),
    ) -> None:
        self.experts = list(experts)
        self.retired = frozenset(retired)
        """Indices of the experts whose prompts go to the base."""
        self.null = tuple(null)
        self.shrinkage = shrinkage
        if self.experts:
            self.gaussians = Gaussians([*self.experts, *self.null], shrinkage=shrinkage)

    def scores(self, features_BF: Tensor, *, candidates: int = CANDIDATES) -> Tensor:
        """Returns log-likelihoods up to a constant: of the experts (B, E), then of the null expert if there is one (B, E + 1).

        Experts that are not among the `candidates` likeliest by the linear score have -inf.
        """
        features_BF = features_BF.double().cpu()
        linear_BC, count = self.gaussians.linear(features_BF), len(self.experts)
        scored_BC = torch.cat([_largest(part, candidates) for part in linear_BC.tensor_split([count], dim=-1)], dim=-1)
        scores_BC = self.gaussians.scores(features_BF, scored_BC)
        if not self.null:
            return scores_BC
        likeliest_B, null_BK = scores_BC[:, :count].argmax(-1), scores_BC[:, count:]
        scored_BC = torch.cat([torch.zeros_like(scored_BC[:, :count]), _largest(null_BK, BESIDE)], dim=-1)
        beside_BC = self.gaussians.beside(features_BF, likeliest_B, scored_BC)
        null_B = torch.maximum(null_BK.logsumexp(-1), beside_BC.logsumexp(-1))
        return torch.cat([scores_BC[:, :count], null_B.unsqueeze(-1)], dim=-1)

    def rank_candidates(self, features_BF: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns the likeliest experts of every prompt (B, M), NULL_EXPERT among them, and their log-posterior (B, M).

        In falling order; M is `count`, or less where there are fewer classes.
        """
        experts = len(self.experts)
        if experts == 0:
            return torch.full((len(features_BF), 1), NULL_EXPERT), torch.zeros(len(features_BF), 1, dtype=torch.float64)
        scores_BC = self.scores(features_BF)
        if not self.null:
            scores_BC = self._rejecting(scores_BC, features_BF.cpu())
        posterior_BC = scores_BC.log_softmax(-1)
        best_BM, classes_BM = posterior_BC.topk(min(count, posterior_BC.shape[-1]), dim=-1)
        return torch.where(classes_BM == experts, NULL_EXPERT, classes_BM), best_BM

    def _rejecting(self, scores_BC: Tensor, features_BF: Tensor) -> Tensor:
        """Rejects experts whose threshold a prompt exceeds, and adds NULL_EXPERT: the class of prompts that all of them reject.

        A distance costs a product with the expert's own factor, so only the likeliest experts are asked: each once, with all
        prompts that it is among the likeliest of.
        """
        allowed_BE = torch.full_like(scores_BC, -torch.inf)
        nearest_BK = scores_BC.topk(min(CANDIDATES, scores_BC.shape[-1]), dim=-1).indices
        for expert in nearest_BK.unique().tolist():
            rows = (nearest_BK == expert).any(-1).nonzero().squeeze(-1)
            statistics = self.experts[expert]
            inside = statistics.distance(features_BF[rows], shrinkage=self.shrinkage) <= statistics.threshold
            allowed_BE[rows[inside], expert] = scores_BC[rows[inside], expert]
        base_B1 = torch.where(allowed_BE.isinf().all(-1, keepdim=True), 0.0, -torch.inf).to(scores_BC)
        return torch.cat([allowed_BE, base_B1], dim=-1)

    def choices(self, features_BF: Tensor) -> Tensor:
        """Returns each prompt's likeliest expert, or NULL_EXPERT (B,)."""
        experts_B1, _ = self.rank_candidates(features_BF, 1)
        return self.in_use(experts_B1)[:, 0]

    def in_use(self, experts_BM: Tensor) -> Tensor:
        """Puts NULL_EXPERT in the place of retired experts (B, M)."""
        if not self.retired:
            return experts_BM
        retired_R = torch.tensor(sorted(self.retired), device=experts_BM.device)
        return experts_BM.masked_fill(torch.isin(experts_BM, retired_R), NULL_EXPERT)

    def route(self, features_BF: Tensor) -> Route:
        """Sends every prompt to its likeliest expert, or to the base."""
        experts_B1, log_posterior_B1 = self.rank_candidates(features_BF, 1)
        return prompt_route(
            self.in_use(experts_B1), torch.ones(experts_B1.shape), features_BF.device, log_posterior_B1[:, 0].exp()
        )


def _largest(scores_BC: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` largest of every row (B, C)."""
    best_BK = scores_BC.topk(min(count, scores_BC.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores_BC, dtype=torch.bool).scatter(-1, best_BK, True)


def prompt_route(
    experts_BM: Tensor, weights_BM: Tensor, device: torch.device, posterior_B: Tensor | None = None
) -> Route:
    """Returns the route with these weights; in its cheap forms where nobody takes part, or all rows agree."""
    if (experts_BM == NULL_EXPERT).all():
        return BaseOnly(posterior_B)
    if len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all() and (weights_BM == weights_BM[0]).all():
        experts_BM, weights_BM = experts_BM[:1], weights_BM[:1]
    return PromptRoute(experts_BM.to(device), weights_BM.to(device), posterior_B)
