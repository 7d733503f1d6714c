"""Both levels: the prompt decides who may take part, the tokens decide how much.

    L    = the m likeliest classes of the prompt router, the null expert among them       p = its posterior
    w_te = softmax over e in L of ( z_te / temperature + log p_e )                          z as in the token router

The null expert and an expert without the Linear at hand score z = 0. Where the prompt is clear, the prior decides and the
route is the prompt router's; where two tasks look alike, tokens mix them. A class less likely than `SLIGHT` leaves the
list, so that clear prompts cost one expert. Shapes: B prompts, F features, M places on the short list.
"""

import math

import torch
from torch import Tensor

from pipeline.routing.prompt_router import PromptRouter, fixed
from pipeline.routing.route import Mixed, Route

SLIGHT = 1e-3
"""Posterior below which a class cannot change an answer visibly."""


class TwoLevelRouter:
    """Short-lists experts by prompt, mixes them by token."""

    def __init__(self, prompts: PromptRouter, *, short_list: int, temperature: float) -> None:
        self.prompts, self.places, self.temperature = prompts, short_list, temperature

    def route(self, features_BF: Tensor) -> Route:
        """Makes the short list of every prompt."""
        experts_BM, prior_BM = self.prompts.short_list(features_BF, self.places)
        likely_BM = prior_BM >= math.log(SLIGHT)
        places = int(likely_BM.sum(-1).max())
        experts_BM, prior_BM = (
            experts_BM[:, :places],
            prior_BM[:, :places].masked_fill(~likely_BM[:, :places], -torch.inf),
        )
        if places == 1:
            return fixed(experts_BM, torch.ones(experts_BM.shape), features_BF.device)
        if len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all() and (prior_BM == prior_BM[0]).all():
            experts_BM, prior_BM = experts_BM[:1], prior_BM[:1]
        return Mixed(experts_BM.to(features_BF.device), prior_BM.float().to(features_BF.device), self.temperature)
