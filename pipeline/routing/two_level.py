"""Both levels: the prompt decides who may take part, the Linears decide how much.

    L    = the m likeliest classes of the prompt router, the null expert among them, with a probability of MIN_WEIGHT or more
    w_le = softmax over L of ( evidence_le / temperature + log-posterior_e )                evidence: see `evidence`

Where the prompt is clear, the list has one place and the route is the prompt router's, at its price. Where prompts of two
tasks look alike at the language model's input (the same words in another order, say), what its layers make of them
decides. Shapes: B prompts, F features, M places on the list.
"""

import math

import torch
from torch import Tensor

from pipeline.routing.prompt_router import PromptRouter, fixed
from pipeline.routing.routes import MIN_WEIGHT, MIXED, LayerRoute, Route


class TwoLevelRouter:
    """Short-lists experts by prompt, weighs them by Linear."""

    def __init__(self, prompts: PromptRouter, *, short_list: int, temperature: float) -> None:
        self.prompts, self.places, self.temperature = prompts, short_list, temperature

    def route(self, features_BF: Tensor) -> Route:
        """Makes the short list of every prompt."""
        experts_BM, prior_BM, likely_BM = self._listed(features_BF)
        places = int(likely_BM.sum(-1).max())
        if places == 1:
            return fixed(experts_BM[:, :1], torch.ones(len(experts_BM), 1), features_BF.device)
        experts_BM = experts_BM[:, :places].to(features_BF.device)
        prior_BM = prior_BM[:, :places].masked_fill(~likely_BM[:, :places], -torch.inf).float()
        return LayerRoute(experts_BM, prior_BM.to(features_BF.device), places, self.temperature)

    def choices(self, features_BF: Tensor) -> Tensor:
        """Returns the expert, or NULL_EXPERT, of prompts whose list has one place, MIXED for the others (B,)."""
        experts_BM, _, likely_BM = self._listed(features_BF)
        return experts_BM[:, 0].where(likely_BM.sum(-1) == 1, MIXED)

    def _listed(self, features_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the likeliest experts, their log-posterior, and whether they stand on the short list, each (B, M)."""
        experts_BM, prior_BM = self.prompts.short_list(features_BF, self.places)
        return experts_BM, prior_BM, prior_BM >= prior_BM[:, :1].clamp(max=math.log(MIN_WEIGHT))  # the likeliest always
