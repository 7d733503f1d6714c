"""Both levels: the prompt decides who may take part, the Linears decide how much.

    L    = the m likeliest classes of the prompt router, the null expert among them, with a probability of MIN_WEIGHT or more
    w_le = softmax over L of ( s_le / temperature + log-posterior_e )      s: log-likelihoods, see `layer_classifiers`

A clear prompt has one candidate: its route is the prompt router's, at its price. Where prompts of two tasks look alike at
the language model's input (the same words in another order, say), the inputs of its layers decide. Shapes: B prompts,
F features, M candidates.
"""

import math

import torch
from torch import Tensor

from pipeline.routing.prompt_router import PromptRouter, prompt_route
from pipeline.routing.routes import MIN_WEIGHT, MIXED, LayerRoute, Route


class TwoLevelRouter:
    """Selects candidates per prompt, weights them per Linear."""

    def __init__(self, prompts: PromptRouter, *, candidates: int, temperature: float) -> None:
        self.prompts, self.candidates, self.temperature = prompts, candidates, temperature

    def route(self, features_BF: Tensor) -> Route:
        """Selects the candidates of every prompt."""
        experts_BM, prior_BM, likely_BM = self._ranked(features_BF)
        most = int(likely_BM.sum(-1).max())
        if most == 1:
            weights_B1, posterior_B = torch.ones(len(experts_BM), 1), prior_BM[:, 0].exp()
            return prompt_route(experts_BM[:, :1], weights_B1, features_BF.device, posterior_B)
        experts_BM = experts_BM[:, :most].to(features_BF.device)
        prior_BM = prior_BM[:, :most].masked_fill(~likely_BM[:, :most], -torch.inf).float()
        return LayerRoute(experts_BM, prior_BM.to(features_BF.device), most, self.temperature)

    def choices(self, features_BF: Tensor) -> Tensor:
        """Returns the expert, or NULL_EXPERT, of prompts with one candidate, MIXED for the others (B,)."""
        experts_BM, _, likely_BM = self._ranked(features_BF)
        return experts_BM[:, 0].where(likely_BM.sum(-1) == 1, MIXED)

    def _ranked(self, features_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the likeliest experts, their log-posterior, and whether they are candidates, each (B, M).

        The likeliest one always is: its own probability may be below MIN_WEIGHT where very many experts are alike.
        """
        experts_BM, prior_BM = self.prompts.rank_candidates(features_BF, self.candidates)
        experts_BM = self.prompts.in_use(experts_BM)
        return experts_BM, prior_BM, prior_BM >= prior_BM[:, :1].clamp(max=math.log(MIN_WEIGHT))
