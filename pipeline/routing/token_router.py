"""The token router, as published: every Linear chooses for every token on its own.

    z_te = <LN(x_t), LN(v_e)> / sqrt(D)                        LN without affine, eps 1e-5
    w_te = softmax over the k largest z_t / temperature, 0 elsewhere

arXiv 2511.01831, formulas as in PHATGOOSE (arXiv 2402.05859, section 3). Since LN(v) sums to zero,
<LN(x), LN(v)> = <x, LN(v)> / std(x): the scores come out of the same product as the down-projections. Shapes: T tokens
(any leading dimensions), D input width, E experts, K chosen.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.routing.route import Free, Route

EPS = 1e-5


class TokenRouter:
    """Leaves the choice to every Linear and token."""

    def __init__(self, *, top_k: int, temperature: float) -> None:
        self._route = Free(top_k, temperature)

    def route(self, features_BF: Tensor) -> Route:
        """Decides nothing beforehand."""
        return self._route


def normalise_vector(vector_D: Tensor) -> Tensor:
    """Returns LN(v) of a routing vector (D,)."""
    return functional.layer_norm(vector_D, vector_D.shape[-1:], eps=EPS)


def token_scores(products_TE: Tensor, x_TD: Tensor) -> Tensor:
    """Turns the products <x_t, LN(v_e)> (.., T, E) into scores z (.., T, E), float32."""
    std_T1 = (x_TD.float().var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
    return products_TE.float() / (std_T1 * x_TD.shape[-1] ** 0.5)


def keep_largest(scores_TE: Tensor, top_k: int) -> Tensor:
    """Returns the softmax over the `top_k` largest scores of a token (.., T, E), 0 elsewhere."""
    if top_k < scores_TE.shape[-1]:
        best_TK, index_TK = scores_TE.topk(top_k, dim=-1)
        return torch.zeros_like(scores_TE).scatter(-1, index_TK, best_TK.softmax(-1))
    return scores_TE.softmax(-1)
