"""The token router, as published: every Linear chooses for every token on its own.

    z_te = <LN(x_t), LN(v_e)> / (sqrt(D) temperature)       LN without affine, eps 1e-5
    w_te = softmax over the k largest z_t, 0 elsewhere

arXiv 2511.01831, formulas as in PHATGOOSE (arXiv 2402.05859, section 3). Since LN(v) sums to zero,
<LN(x), LN(v)> = <x, LN(v)> / std(x): the scores come out of the same product as the down-projections. Shapes: T tokens
(any leading dimensions), D input width, E experts, K chosen.
"""

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5


def normalise_vector(vector_D: Tensor) -> Tensor:
    """Returns LN(v) of a routing vector (D,)."""
    return functional.layer_norm(vector_D, vector_D.shape[-1:], eps=EPS)


def token_weights(products_TE: Tensor, x_TD: Tensor, *, top_k: int, temperature: float) -> Tensor:
    """Turns the products <x_t, LN(v_e)> (.., T, E) into mixing weights (.., T, E), at most `top_k` of them not zero."""
    std_T1 = (x_TD.float().var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
    scores_TE = products_TE.float() / (std_T1 * (x_TD.shape[-1] ** 0.5 * temperature))
    count = scores_TE.shape[-1]
    if top_k < count:
        best_TK, index_TK = scores_TE.topk(top_k, dim=-1)
        return torch.zeros_like(scores_TE).scatter(-1, index_TK, best_TK.softmax(-1))
    return scores_TE.softmax(-1)
