"""How a batch is routed: what a router decides at prefill, and what all routed Linears of a model read.

Shapes: B rows, T tokens, E experts of the pool, M places on a prompt's short list, S rows of stacked A matrices.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

NULL_EXPERT = -1
"""On a list of experts: the null expert, that is the base as it is."""

MIXED = -2
"""In place of a prompt's expert: its Linears choose, or mix several."""

MIN_WEIGHT = 1e-3
"""Weight or probability below which an expert cannot change an answer visibly; it is left out, and costs nothing."""


@dataclass(frozen=True)
class BaseOnly:
    """The base answers every row."""

    posterior_B: Tensor | None = field(default=None, compare=False)
    """As in PromptRoute."""


@dataclass(frozen=True)
class PromptRoute:
    """One weight for all Linears and tokens."""

    experts_BM: Tensor
    """Candidates of each row (B, M), or (1, M) where all rows agree: indices into the pool, or NULL_EXPERT."""
    weights_BM: Tensor
    """Their weights, of the same shape."""
    posterior_B: Tensor | None = None
    """Probability of each row's choice by the prompt router, where that alone has chosen."""


@dataclass(frozen=True)
class LayerRoute:
    """Every Linear weights a list of experts by the log-likelihoods of its own and all earlier inputs (`layer_classifiers`)."""

    experts_BM: Tensor
    """Candidates, as in PromptRoute."""
    prior_BM: Tensor
    """Log prior, added to the log-likelihoods."""
    top_k: int = 2
    """Number of candidates that may have a weight."""
    temperature: float = 1.0
    """Divides the log-likelihoods, not the prior."""


@dataclass(frozen=True)
class TokenRoute:
    """Every Linear chooses from the whole pool, for every token, by the trained routing vectors."""

    top_k: int = 2
    """Experts with a weight at each token."""
    temperature: float = 1.0
    """Temperature of the softmax."""


Route = BaseOnly | PromptRoute | LayerRoute | TokenRoute


class Router(Protocol):
    """Decides how prompts are routed."""

    def route(self, features_BF: Tensor) -> Route:
        """Decides for a batch from its prompt features (B, F)."""
        ...

    def choices(self, features_BF: Tensor) -> Tensor:
        """Returns who alone answers each prompt (B,): an index into the pool, NULL_EXPERT, or MIXED."""
        ...


@dataclass(eq=False)
class RoutingState:
    """What the routed Linears share in one call: the route of its prompts, and what they did with it."""

    pool_size: int
    """Number of experts E."""
    route: Route = BaseOnly()
    tokens_BT: Tensor | None = None
    """Mask of the prompt's real tokens."""
    decoding: bool = False
    """Whether the prompt has been read, so that every choice is made."""
    log_likelihoods: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By Linear that observes the prompt: log-likelihood of every class so far (B, E + 1), the null expert last."""
    cached_choice: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """By Linear: rows of its stacked A matrices that take part, and their weights (B, S); chosen at prefill."""
    layer_weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By Linear that decides for itself: mean weight of each expert over the prompt's tokens (B, E)."""
    traces: dict[str, Tensor] | None = field(default=None, repr=False)
    """By Linear: weight of each expert at each prompt token (B, T, E); kept only while this is not None."""
    _placed: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device, tensor: Tensor) -> Tensor:
        """Returns a tensor of the route, or `tokens_BT`, on a Linear's device; it is copied to each device once."""
        if tensor.device == device or torch.compiler.is_compiling():
            return tensor.to(device)
        key = id(tensor), device
        if key not in self._placed:
            self._placed[key] = tensor.to(device)
        return self._placed[key]

    def decode(self) -> None:
        """Ends the prompt: choices are cached from here on, and no Linear observes any more."""
        if not self.decoding:
            self.decoding = True
            self.log_likelihoods.clear()

    @property
    def weights_BE(self) -> Tensor | None:
        """Mean weight of each expert (B, E): over Linears and tokens where they decide, else the decision itself."""
        if isinstance(self.route, PromptRoute):
            return to_pool_weights(self.route.weights_BM, self.route.experts_BM, self.pool_size)
        if not self.layer_weights:
            return None
        first, *others = self.layer_weights.values()
        return torch.stack([first, *(votes_BE.to(first.device) for votes_BE in others)]).mean(0)


def to_pool_weights(weights_BxM: Tensor, experts_BM: Tensor, pool_size: int) -> Tensor:
    """Turns weights of short lists (B, .., M) into weights of the whole pool (B, .., E)."""
    index_BxM = experts_BM.view(len(experts_BM), *[1] * (weights_BxM.dim() - 2), -1).expand_as(weights_BxM)
    weights_BxC = weights_BxM.new_zeros(*weights_BxM.shape[:-1], pool_size + 1)
    # NULL_EXPERT counts from the end: it lands in the extra column, which is cut off.
    return weights_BxC.scatter_add(-1, index_BxM % (pool_size + 1), weights_BxM)[..., :-1]
