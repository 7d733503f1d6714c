"""One call: a batch of prompts, who answers them, and by which pool.

Shapes: B rows, T tokens, E experts, F features.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from pipeline.routing.pool import Pool
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.router_cache import pool_statistics
from pipeline.routing.routes import BaseOnly, PromptRoute, Route, Router, RoutingState
from pipeline.routing.store import StoredExpert, same_expert
from pipeline.routing.token_router import TokenRouter
from pipeline.routing.two_level import TwoLevelRouter


@dataclass(frozen=True)
class Decision:
    """Who answered a prompt."""

    expert: str | None
    """The expert with the largest weight; None where the base's is larger."""
    weights: dict[str, float]
    """Weight of each expert; where tokens decide, its mean over the prompt's tokens and all Linears. The remainder
    to 1 is the base's weight."""
    posterior: float | None = field(default=None, compare=False)
    """Probability of this choice by the prompt router (of a retired expert, in whose place the base answers, that expert's);
    None where the Linears decide, the caller does, or the pool is empty."""


def router_of(pool: Pool, before: "Routers | None" = None) -> Router:
    """Returns the router that a pool's settings ask for; `before` are those of a pool that it may have come from."""
    settings = pool.router
    if settings.kind == "token":
        return TokenRouter(
            len(pool.experts),
            null=bool(pool.null_layer_statistics),
            phatgoose=settings.token_scores == "phatgoose",
            top_k=settings.top_k,
            temperature=settings.temperature,
        )
    prompts = prompt_router_of(pool, before)
    if settings.kind == "prompt":
        return prompts
    return TwoLevelRouter(prompts, candidates=settings.candidates, temperature=settings.temperature)


def prompt_router_of(pool: Pool, before: "Routers | None" = None) -> PromptRouter:
    """Returns the prompt router over a pool's experts, made of that of another pool where they differ little."""
    router = None if before is None else _continued(pool, before)
    if router is None:
        statistics = pool_statistics(list(pool.experts.entries.values()))
        pooled = statistics.pooled
        if pooled is not None:
            for component in pool.null:
                pooled += component
        router = PromptRouter(
            statistics.experts, pool.null, shrinkage=pool.router.shrinkage, pooled=pooled, few=statistics.few
        )
    return router.retiring([pool.names.index(name) for name in pool.retired])


def _continued(pool: Pool, before: "Routers") -> PromptRouter | None:
    """Returns a pool's router made of another's by the experts that came and went; None where that is not less work."""
    if (
        before.known_prompts is None
        or pool.router.shrinkage != before.pool.router.shrinkage
        or pool.null != before.pool.null
    ):
        return None
    router, old, new = before.known_prompts, before.pool.experts.entries, pool.experts.entries
    kept = [name for name in old if name in new and same_expert(old[name], new[name])]
    staying = set(kept)
    if [name for name in new if name in staying] != kept or len(old) + len(new) - 2 * len(kept) > len(new) // 2:
        return None
    for position in reversed([place for place, name in enumerate(old) if name not in staying]):
        router = router.remove(position)
    for position, (name, entry) in enumerate(new.items()):
        if name not in staying:
            statistics = (entry.read() if isinstance(entry, StoredExpert) else entry).statistics
            router = router.insert(position, statistics)
    return router


class Routers:
    """A pool and the routers that its settings ask for; those of a pool that was there `before` make them cheaper."""

    def __init__(self, pool: Pool, before: "Routers | None" = None) -> None:
        self.pool = pool
        self.router = router_of(pool, before)

    @property
    def known_prompts(self) -> PromptRouter | None:
        """The prompt router of this pool, if it was needed so far."""
        match self.router:
            case PromptRouter():
                return self.router
            case TwoLevelRouter():
                return self.router.prompts
        return self.__dict__.get("prompts")

    @cached_property
    def prompts(self) -> PromptRouter:
        """The prompt router of this pool, whichever router is in force."""
        return self.known_prompts or prompt_router_of(self.pool)


class Call:
    """One batch of prompts, from the moment the language model reads them."""

    def __init__(self, *, traced: bool = False) -> None:
        self.traced = traced
        self.names: Sequence[str] = ()
        """Names of the experts of the pool in force when the call began, in its order."""
        self.paths: Sequence[str] = ()
        """Paths of the Linears that the pool adapts, in the model's order."""
        self.features_BF: Tensor | None = None
        self.state = RoutingState(0)
        # Threads keep their last call for ever; a pool that was replaced must not stay in memory for that.
        self._routers: weakref.ref[Routers] | None = None
        self._held: Routers | None = None

    @property
    def routers(self) -> Routers | None:
        """The pool in force when the call began, and its routers.

        None before it has begun, and when it is over and another pool has taken that one's place.
        """
        return None if self._routers is None else self._routers()

    def begin(
        self,
        routers: Routers,
        paths: Sequence[str],
        features_BF: Tensor,
        route: Route,
        tokens_BT: Tensor | None,
        *,
        keep: bool,
    ) -> None:
        """Records how a batch is routed; what a batch before it has left is gone. `keep` keeps the pool until `end`."""
        self._routers, self._held = weakref.ref(routers), routers if keep else None
        self.names, self.paths, self.features_BF = routers.pool.names, paths, features_BF
        self.state = RoutingState(len(routers.pool.experts), route, tokens_BT, traces={} if self.traced else None)

    def end(self) -> None:
        """Lets go of the pool; decisions stay readable."""
        self._held = None

    @property
    def decisions(self) -> list[Decision]:
        """Who answers each row that the model reads; empty before the prompts are read.

        Each beam, and each of several sequences asked for, is a row of its own.
        """
        if self.features_BF is None:
            return []
        rows, weights_BE = len(self.features_BF), self.state.weights_BE
        posteriors: list[float | None] = [None] * rows
        match self.state.route:
            case BaseOnly(posterior_B=Tensor() as posterior_B) | PromptRoute(posterior_B=Tensor() as posterior_B):
                posteriors = posterior_B.tolist()
        if weights_BE is None:
            return [Decision(None, {}, posterior) for posterior in posteriors]
        decisions = []
        for row, posterior in zip(weights_BE.expand(rows, -1).tolist(), posteriors, strict=True):
            weights = {name: weight for name, weight in zip(self.names, row, strict=True) if weight > 0}
            best = max(weights, key=weights.__getitem__, default=None)
            if best is not None and weights[best] < 1 - sum(weights.values()):
                best = None
            decisions.append(Decision(best, weights, posterior))
        return decisions
