"""The token router: every Linear chooses on its own, among all experts and the null expert.

By default it chooses by the log-likelihood of the prompt up to its depth (`layer_classifiers`). With `phatgoose` it chooses
for every token by itself:

    z_te = <LN(x_t), LN(v_e)> / sqrt(D)                        LN without affine, eps 1e-5
    w_te = softmax over the k largest z_t / temperature, 0 elsewhere

arXiv 2511.01831, formulas as in PHATGOOSE (arXiv 2402.05859, section 3). Since LN(v) sums to zero,
<LN(x), LN(v)> = <x, LN(v)> / std(x): the scores come out of the same product as the down-projections. Shapes: T tokens
(any leading dimensions), D input width, E experts, K chosen.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.routing.routes import MIXED, NULL_EXPERT, LayerRoute, Route, TokenRoute

EPS = 1e-5


class TokenRouter:
    """Leaves the choice to every Linear: by log-likelihood, or for every token by the trained vectors (PHATGOOSE)."""

    def __init__(self, experts: int, *, null: bool, phatgoose: bool, top_k: int, temperature: float) -> None:
        classes = torch.tensor([[*range(experts), *([NULL_EXPERT] if null else [])]])
        self._route: Route = (
            TokenRoute(top_k, temperature)
            if phatgoose
            else LayerRoute(classes, torch.zeros(classes.shape), top_k, temperature)
        )

    def route(self, features_BF: Tensor) -> Route:
        """Decides nothing beforehand."""
        if isinstance(self._route, LayerRoute) and self._route.experts_BM.device != features_BF.device:
            device = features_BF.device
            self._route = replace(
                self._route, experts_BM=self._route.experts_BM.to(device), prior_BM=self._route.prior_BM.to(device)
            )
        return self._route

    def choices(self, features_BF: Tensor) -> Tensor:
        """Leaves all prompts to the Linears: MIXED (B,)."""
        return torch.full((len(features_BF),), MIXED)


def normalise_vector(vector_D: Tensor) -> Tensor:
    """Returns LN(v) of a routing vector (D,)."""
    return functional.layer_norm(vector_D, vector_D.shape[-1:], eps=EPS)


def token_scores(products_TE: Tensor, x_TD: Tensor) -> Tensor:
    """Turns the products <x_t, LN(v_e)> (.., T, E) into scores z (.., T, E), float32."""
    # E[x^2] - E[x]^2: several times faster on CPU than var(), exact enough for inputs whose mean is not far from zero.
    x_TD = x_TD.float()
    square_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).square() / x_TD.shape[-1]
    variance_T1 = (square_T1 - x_TD.mean(-1, keepdim=True).square()).clamp(min=0)
    return products_TE.float() / ((variance_T1 + EPS).sqrt() * x_TD.shape[-1] ** 0.5)


def keep_largest(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns the softmax over the `top_k` largest scores of a token (.., T, E), 0 elsewhere."""
    if top_k < scores_TE.shape[-1]:
        best_TK, index_TK = scores_TE.topk(top_k, dim=-1)
        return torch.zeros_like(scores_TE).scatter(-1, index_TK, best_TK.softmax(-1))
    return scores_TE.softmax(-1)
