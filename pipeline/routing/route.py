"""How a batch is routed: what a router decides at prefill, and what all routed Linears of a model read.

Shapes: B rows, T tokens, E experts of the pool, M places on a prompt's short list.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

NOBODY = -1
"""On a list of experts: the null expert, that is the base as it is."""

SLIGHT = 1e-3
"""Weight or probability below which an expert cannot change an answer visibly; it is left out, and costs nothing."""


@dataclass(frozen=True)
class Base:
    """The base answers every row."""


@dataclass(frozen=True)
class Fixed:
    """One weight for all Linears and tokens."""

    experts_BM: Tensor
    """Short list of each row (B, M), or (1, M) where all rows agree: indices into the pool, or NOBODY."""
    weights_BM: Tensor
    """Their weights, of the same shape."""


@dataclass(frozen=True)
class Weighed:
    """Every Linear weighs a list of experts by the evidence of its own and all earlier inputs (see `evidence`)."""

    experts_BM: Tensor
    """List, as in Fixed."""
    prior_BM: Tensor
    """Log prior, added to the evidence."""
    top_k: int = 2
    """Places of the list that may have a weight."""
    temperature: float = 1.0
    """Divides the evidence, not the prior."""


@dataclass(frozen=True)
class Free:
    """Every Linear chooses from the whole pool, for every token, by the trained routing vectors."""

    top_k: int = 2
    """Experts with a weight at each token."""
    temperature: float = 1.0
    """Temperature of the softmax."""


Route = Base | Fixed | Weighed | Free


class Router(Protocol):
    """Decides how prompts are routed."""

    def route(self, features_BF: Tensor) -> Route:
        """Decides for a batch from its prompt features (B, F)."""
        ...


@dataclass
class RoutingState:
    """What the routed Linears of one model share: the route in force, and what they did with it."""

    pool_size: int
    """Number of experts E."""
    route: Route = Base()
    tokens_BT: Tensor | None = None
    """Prefill: mask of the real tokens; None while decoding."""
    evidence: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By Linear that hears the prompt: log-likelihood of every class so far (B, E + 1), the null expert last."""
    votes: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """By Linear that decides for itself: mean weight of each expert over the prompt's tokens (B, E)."""
    traces: dict[str, Tensor] | None = field(default=None, repr=False)
    """By Linear: weight of each expert at each token (B, T, E); kept only while this is not None."""

    def begin(self, route: Route, tokens_BT: Tensor | None) -> None:
        """Starts a prompt."""
        self.route, self.tokens_BT = route, tokens_BT
        self.votes.clear()
        self.evidence.clear()

    @property
    def weights_BE(self) -> Tensor | None:
        """Mean weight of each expert (B, E): over Linears and tokens where they decide, else the decision itself."""
        if isinstance(self.route, Fixed):
            return spread(self.route.weights_BM, self.route.experts_BM, self.pool_size)
        if not self.votes:
            return None
        return torch.stack(list(self.votes.values())).mean(0)


def spread(weights_BxM: Tensor, experts_BM: Tensor, pool_size: int) -> Tensor:
    """Turns weights of short lists (B, .., M) into weights of the whole pool (B, .., E)."""
    index_BxM = experts_BM.view(len(experts_BM), *[1] * (weights_BxM.dim() - 2), -1).expand_as(weights_BxM)
    whole = weights_BxM.new_zeros(*weights_BxM.shape[:-1], pool_size + 1)
    # NOBODY counts from the end: it lands in the extra column, which is cut off.
    return whole.scatter_add(-1, index_BxM % (pool_size + 1), weights_BxM)[..., :-1]
