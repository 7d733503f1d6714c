"""The prompt router: one decision per prompt, in closed form.

Every expert is a Gaussian over the prompt features, with its own mean and its own covariance blended with that of all;
base prompts, which belong to the null expert, are several (`gaussian`, `null`). All have equal priors. The null expert's
components, known from few prompts, are scored as classes like the others, then the likeliest as ones that resemble the
prompt's likeliest expert; the better of the two scores counts. A distance by the shared covariance picks the candidates. The
router is the same in whatever order the tasks came, equals the one trained on all tasks' prompts together, and forgets an
expert exactly when its term is left out. Where base prompts say nothing, since there are none, or the prompt has an image and
none of them has, a prompt beyond the threshold of each of its likeliest experts goes to the base.

A candidate's score costs a factorisation, F x F, that no sum can keep: own and shared covariance are blended, and the latter
changes with every expert that comes. So among many experts the same is done in a few projected features first (`coarse`),
and only what that leaves open in all of them. Shapes: B prompts, F features, C classes (experts, then the null expert's
components), E experts, K components, L classes listed for each prompt, M candidates.
"""

from collections.abc import Collection, Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from pipeline.routing import coarse
from pipeline.routing.features import has_image
from pipeline.routing.gaussian import Gaussians, grouped
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.routes import NULL_EXPERT, BaseOnly, PromptRoute, Route
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.unseen import UnseenImages

CANDIDATES = 8
"""How many of the nearest experts, and of the null expert's components, are scored; without a null expert, how many of the
likeliest experts are asked whether a prompt lies within their threshold."""
BESIDE = 2
"""How many of the null expert's likeliest components are scored beside the likeliest expert."""
MANY = 16
"""Experts from which on few features are tried first; the factors of fewer are soon all there."""
AT_ONCE = 2**25
"""Distances that are computed at once, which bounds memory where prompts and experts are many."""


class PromptRouter:
    """Chooses one expert, or the base, for every prompt. An expert that comes or goes makes another router of it."""

    def __init__(
        self,
        experts: Sequence[PromptStatistics],
        null: Sequence[PromptStatistics] = (),
        *,
        shrinkage: float = 0.05,
        retired: Collection[int] = (),
        pooled: PooledStatistics | None = None,
        few: Iterable[PromptStatistics] | None = None,
    ) -> None:
        """Where somebody has them: `pooled` are the sums of experts and null expert, `few` the experts in few features."""
        self.experts = list(experts)
        self.retired = frozenset(retired)
        """Indices of the experts whose prompts go to the base."""
        self.null = tuple(null)
        self.shrinkage = shrinkage
        self.gaussians: Gaussians | None = None
        self.few: Gaussians | None = None
        """The same in few features, where there are many experts."""
        if self.experts:
            self.gaussians = Gaussians([*self.experts, *self.null], shrinkage=shrinkage, pooled=pooled)
            self.few = self._in_few_features(few)

    def _in_few_features(self, few: Iterable[PromptStatistics] | None) -> Gaussians | None:
        if len(self.experts) < MANY or self.experts[0].width <= 2 * coarse.WIDTH:
            return None
        few = map(coarse.coarse_statistics, self.experts) if few is None else few
        return Gaussians([*few, *map(coarse.coarse_statistics, self.null)], shrinkage=self.shrinkage)

    def insert(self, position: int, statistics: PromptStatistics) -> "PromptRouter":
        """Returns the router with one more expert, at the price of that one; equal to one made of all, but for rounding."""
        experts = [*self.experts[:position], statistics, *self.experts[position:]]
        router = copy(self)
        router.experts, router.retired = experts, frozenset(r + (r >= position) for r in self.retired)
        if self.gaussians is None:
            return PromptRouter(experts, self.null, shrinkage=self.shrinkage)
        router.gaussians = self.gaussians.insert(position, statistics)
        if self.few is None:
            router.few = router._in_few_features(None)
        else:
            router.few = self.few.insert(position, coarse.coarse_statistics(statistics))
        return router

    def remove(self, position: int) -> "PromptRouter":
        """Returns the router as if this expert had never been in it, but for rounding."""
        experts = [*self.experts[:position], *self.experts[position + 1 :]]
        if not experts:
            return PromptRouter([], self.null, shrinkage=self.shrinkage)
        assert self.gaussians is not None
        router = copy(self)
        router.experts, router.retired = experts, frozenset(r - (r > position) for r in self.retired - {position})
        router.gaussians = self.gaussians.remove(position)
        router.few = None if self.few is None or len(experts) < MANY else self.few.remove(position)
        return router

    def retiring(self, retired: Collection[int]) -> "PromptRouter":
        """Returns the router with the base in place of these experts and no others."""
        router = copy(self)
        router.retired = frozenset(retired)
        return router

    def release(self) -> None:
        """Lets go of the factors that it keeps, which are most of its memory; they are computed again when they are needed."""
        for gaussians in (self.gaussians, self.few):
            if gaussians is not None:
                gaussians.release()

    def scores(self, features_BF: Tensor, *, candidates: int = CANDIDATES) -> Tensor:
        """Returns log-likelihoods up to a constant: of the experts (B, E), then of the null expert if there is one (B, E + 1).

        Experts that are not among the `candidates` nearest have -inf.
        """
        assert self.gaussians is not None, "a router without experts has no scores"
        listed_BL, scores_BM = self._listed(self.gaussians, features_BF.double().cpu(), candidates)
        scores_BC = torch.full((len(features_BF), len(self.experts)), -torch.inf, dtype=torch.float64)
        scores_BC.scatter_(-1, listed_BL, scores_BM[:, : listed_BL.shape[-1]])
        return torch.cat([scores_BC, scores_BM[:, listed_BL.shape[-1] :]], dim=-1)

    def rank_candidates(self, features_BF: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns the likeliest experts of every prompt (B, M), NULL_EXPERT among them, and their log-posterior (B, M).

        In falling order; M is `count`, or less where fewer classes are scored.
        """
        if self.gaussians is None:
            return torch.full((len(features_BF), 1), NULL_EXPERT), torch.zeros(len(features_BF), 1, dtype=torch.float64)
        features_BF = features_BF.double().cpu()
        if self.few is None:
            return self.ranked(self.gaussians, features_BF, count)
        experts_BM, log_posterior_BM = self.ranked(self.few, coarse.projected(features_BF), max(count, 2), reject=False)
        open_B = log_posterior_BM[:, 1] > -coarse.CERTAIN
        if (judged_B := self._unknown_to_base(features_BF) & ~open_B).any():
            open_B[judged_B] = ~self._inside(experts_BM[judged_B, :1], features_BF[judged_B])[:, 0]
        if open_B.any():
            ranked = self.ranked(self.gaussians, features_BF[open_B], experts_BM.shape[-1])
            experts_BM[open_B], log_posterior_BM[open_B] = ranked
        return experts_BM[:, :count], log_posterior_BM[:, :count]

    def _unknown_to_base(self, x_BF: Tensor) -> Tensor:
        """Returns of which prompts base prompts say nothing (B,): of all, or of those with an image where none has one."""
        if not self.null:
            return torch.ones(len(x_BF), dtype=torch.bool)
        seen = has_image(torch.stack([component.mean_F for component in self.null])).any()
        return torch.zeros(len(x_BF), dtype=torch.bool) if seen else has_image(x_BF)

    def ranked(self, gaussians: Gaussians, x_BF: Tensor, count: int, *, reject: bool = True) -> tuple[Tensor, Tensor]:
        """Ranks candidates in these features; `reject`, where base prompts say nothing, by the candidates' thresholds."""
        listed_BL, scores_BM = self._listed(gaussians, x_BF, CANDIDATES)
        unknown_B = self._unknown_to_base(x_BF)
        if not self.null:
            scores_BM = torch.nn.functional.pad(scores_BM, (0, 1))
        if unknown_B.any():
            scores_BM[unknown_B, -1] = -torch.inf
            if reject:
                inside_NL = self._inside(listed_BL[unknown_B], x_BF[unknown_B])
                outside_NM = torch.nn.functional.pad(~inside_NL, (0, 1))
                scores_NM = scores_BM[unknown_B].masked_fill(outside_NM, -torch.inf)
                scores_NM[~inside_NL.any(-1), -1] = 0
                scores_BM[unknown_B] = scores_NM
        listed_BM = torch.cat([listed_BL, torch.full((len(x_BF), 1), NULL_EXPERT)], dim=-1)
        best_BM, places_BM = scores_BM.log_softmax(-1).topk(min(count, scores_BM.shape[-1]), dim=-1)
        return listed_BM.gather(-1, places_BM), best_BM

    def _inside(self, listed_BL: Tensor, features_BF: Tensor) -> Tensor:
        """Returns whether each prompt lies within the thresholds of the experts listed for it (B, L).

        A distance costs a product with the expert's own factor: each expert is asked once, with all prompts that list it.
        """
        inside_BL = torch.zeros(listed_BL.shape, dtype=torch.bool)
        for expert, (rows, places) in grouped(listed_BL):
            statistics = self.experts[expert]
            distance_N = statistics.distance(features_BF[rows], shrinkage=self.shrinkage)
            inside_BL[rows, places] = distance_N <= statistics.threshold
        return inside_BL

    def _listed(self, gaussians: Gaussians, x_BF: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns each prompt's nearest experts (B, L), and their scores; then that of the null expert, if any (B, L + 1)."""
        experts, parts = len(self.experts), []
        unseen = UnseenImages.among(gaussians, experts, x_BF)
        for part_BF in x_BF.split(max(1, AT_ONCE // len(gaussians.classes))):
            distance_BC = gaussians.index.distances(part_BF)
            if unseen is not None:
                distance_BC = unseen.distances(part_BF, distance_BC)
            sides = distance_BC.tensor_split([experts], dim=-1)
            parts.append([side_BC.topk(min(count, side_BC.shape[-1]), largest=False).indices for side_BC in sides])
        listed_BL, null_BK = (torch.cat(side) for side in zip(*parts, strict=True))
        scores_BM = gaussians.scores(x_BF, torch.cat([listed_BL, null_BK + experts], dim=-1))
        if not self.null:
            return listed_BL, scores_BM
        scores_BL, scores_BK = scores_BM.tensor_split([listed_BL.shape[-1]], dim=-1)
        if unseen is not None:
            scores_BL = unseen.scores(x_BF, listed_BL, scores_BL)
        likeliest_B = listed_BL.gather(-1, scores_BL.argmax(-1, keepdim=True))[:, 0]
        beside_BK = null_BK.gather(-1, scores_BK.topk(min(BESIDE, scores_BK.shape[-1])).indices) + experts
        beside_B = gaussians.beside(x_BF, likeliest_B, beside_BK).logsumexp(-1)
        null_B1 = torch.maximum(scores_BK.logsumexp(-1), beside_B).unsqueeze(-1)
        return listed_BL, torch.cat([scores_BL, null_B1], dim=-1)

    def by_text_alone(self, features_BF: Tensor) -> Tensor:
        """Returns which experts are judged by a prompt's text alone, since they never saw its kind (B, E) (`unseen`)."""
        unseen = UnseenImages.among(self.gaussians, len(self.experts), features_BF) if self.gaussians else None
        return torch.zeros(len(features_BF), len(self.experts)).bool() if unseen is None else unseen.by(features_BF)

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


def prompt_route(
    experts_BM: Tensor, weights_BM: Tensor, device: torch.device, posterior_B: Tensor | None = None
) -> Route:
    """Returns the route with these weights; in its cheap forms where nobody takes part, or all rows agree."""
    if (experts_BM == NULL_EXPERT).all():
        return BaseOnly(posterior_B)
    if len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all() and (weights_BM == weights_BM[0]).all():
        experts_BM, weights_BM = experts_BM[:1], weights_BM[:1]
    return PromptRoute(experts_BM.to(device), weights_BM.to(device), posterior_B)
