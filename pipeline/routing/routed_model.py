"""A base with a pool attached: `generate` and `forward` as before, routed inside.

The base's Linears are wrapped, not changed: `detach` puts the very same modules back, `load` puts another pool in their
place. The decision is taken at prefill, from what the language model is about to read, and holds while the answer is
generated (with KV cache). Shapes: B rows, T tokens, D width, E experts, F features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.evidence import hearings
from pipeline.routing.expert import Expert
from pipeline.routing.features import project, prompt_features
from pipeline.routing.layer import RoutedLinear, Slot
from pipeline.routing.pool import Pool, PoolError
from pipeline.routing.prompt_router import PromptRouter, fixed
from pipeline.routing.route import NOBODY, Base, Route, Router, RoutingState
from pipeline.routing.token_router import TokenRouter
from pipeline.routing.two_level import TwoLevelRouter


@dataclass(frozen=True)
class Decision:
    """Who answered a prompt."""

    expert: str | None
    """The expert with the largest weight; None where the base's is larger."""
    weights: dict[str, float]
    """Weight of each expert; where tokens decide, its mean over the prompt's tokens and all Linears. What is missing to
    1 is the base's."""


class PromptReader:
    """Takes down the features of every prompt that a model is about to read, at prefill.

    Works on any transformers model whose decoder gets merged embeddings (VLMs) or token ids (text models).
    `listener` gets the features (B, 3 D) and the mask of real tokens (B, T), before the language model runs.
    """

    def __init__(self, model: Any, listener: Any) -> None:
        self.listener = listener
        self._image_token: int | None = getattr(model.config, "image_token_id", None)
        self._masks: tuple[Tensor, Tensor] | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._outer, with_kwargs=True),
            model.get_decoder().register_forward_pre_hook(self._inner, with_kwargs=True),
        ]
        self.prompt_mask: Tensor | None = None
        """Set to (B, T) to count only these tokens as prompt (training rows contain the answer as well)."""

    def _outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise PoolError("routing needs input_ids (image tokens are recognised by their id), not inputs_embeds")
        attention = kwargs.get("attention_mask")
        real = torch.ones_like(input_ids) if attention is None else attention[:, -input_ids.shape[1] :]
        image = torch.zeros_like(input_ids, dtype=torch.bool)
        if self._image_token is not None:
            image = input_ids == self._image_token
        prompt = real.bool() if self.prompt_mask is None else self.prompt_mask.bool()
        self._masks = image & prompt, prompt & ~image

    def _inner(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self.listener(None, None)
            return
        assert self._masks is not None, "the model begins before its decoder"
        image_BT, text_BT = self._masks
        embeds_BTD = kwargs.get("inputs_embeds")
        if embeds_BTD is None:
            embeds_BTD = module.get_input_embeddings()(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        self.listener(prompt_features(embeds_BTD, image_BT, text_BT), image_BT | text_BT)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def router_of(pool: Pool) -> Router:
    """Returns the router that a pool's settings ask for."""
    settings = pool.router
    if settings.kind == "token":
        return TokenRouter(
            len(pool.experts),
            null=bool(pool.null_evidence),
            published=settings.token_scores == "published",
            top_k=settings.top_k,
            temperature=settings.temperature,
        )
    prompts = prompt_router_of(pool)
    if settings.kind == "prompt":
        return prompts
    return TwoLevelRouter(prompts, short_list=settings.short_list, temperature=settings.temperature)


def prompt_router_of(pool: Pool) -> PromptRouter:
    """Returns the prompt router over a pool's experts."""
    statistics = [expert.statistics for expert in pool.experts.values()]
    return PromptRouter(statistics, pool.null, shrinkage=pool.router.shrinkage)


class RoutedModel:
    """A pool attached to a base."""

    def __init__(self, model: Any, pool: Pool) -> None:
        self.model = model
        self._replaced: dict[str, nn.Linear] = {}
        self._forced: tuple[str | None] | None = None
        self.load(pool)
        self._reader = PromptReader(model, self._decide)

    def load(self, pool: Pool) -> None:
        """Routes by `pool` from now on; the model, its hooks and its caches stay as they are.

        Raises PoolError, with nothing changed, where the pool adapts something that is not a Linear, or lacks the expert
        that is forced at the moment.
        """
        if self._forced is not None and self._forced[0] not in (None, *pool.experts):
            raise PoolError(f"expert {self._forced[0]!r} is forced at the moment, and the new pool does not have it")
        experts = list(pool.experts.values())
        paths = sorted({path for expert in experts for path in expert.adapters})
        linears = {path: self._replaced.get(path) or self.model.get_submodule(path) for path in paths}
        for path, linear in linears.items():
            if not isinstance(linear, nn.Linear):
                raise PoolError(f"{path} is {type(linear).__name__}, not a Linear; is another pool still attached?")
        for path in self._replaced.keys() - linears.keys():
            self.model.set_submodule(path, self._replaced[path])
        self._replaced = linears
        self.pool, self.router, self.state = pool, router_of(pool), RoutingState(len(experts))
        self.features_BF: Tensor | None = None
        self._prompts: PromptRouter | None = None
        for path, linear in linears.items():
            slots = [
                Slot(i, a.a_RD, a.b_OR, a.scaling, expert.vectors.get(path, torch.zeros(a.a_RD.shape[1])))
                for i, expert in enumerate(experts)
                if (a := expert.adapters.get(path)) is not None
            ]
            self.model.set_submodule(path, RoutedLinear(linear, self.state, path, slots))
        self._listen(experts)

    def _listen(self, experts: Sequence[Expert]) -> None:
        """Tells every Linear what it hears, where the router asks for evidence."""
        settings = self.pool.router
        if settings.kind == "prompt" or (settings.kind == "token" and settings.token_scores == "published"):
            return
        heard = hearings(
            self.paths,
            [expert.evidence for expert in experts],
            self.pool.null_evidence,
            {path: linear.in_features for path, linear in self._replaced.items()},
            shrinkage=settings.shrinkage,
        )
        for path, hearing in heard.items():
            module = self.model.get_submodule(path)
            module.hearing = hearing.to(module.base.weight.device)

    @torch.no_grad()
    def _decide(self, features_BS: Tensor | None, tokens_BT: Tensor | None) -> None:
        """Chooses at prefill; keeps the choice while decoding (features None)."""
        if features_BS is None:
            self.state.tokens_BT = None
            return
        width = self.pool.width or features_BS.shape[-1]
        self.features_BF = features_BF = project(features_BS, width)
        route: Route = Base()
        if self._forced is not None:
            (name,) = self._forced
            expert = NOBODY if name is None else self.pool.names.index(name)
            route = fixed(torch.full((1, 1), expert), torch.ones(1, 1), features_BS.device)
        elif self.pool.experts:
            route = self.router.route(features_BF)
        self.state.begin(route, tokens_BT)

    @property
    def prompts(self) -> PromptRouter:
        """The prompt router of this pool, whichever router is in force."""
        match self.router:
            case PromptRouter():
                return self.router
            case TwoLevelRouter():
                return self.router.prompts
        if self._prompts is None:
            self._prompts = prompt_router_of(self.pool)
        return self._prompts

    @property
    def paths(self) -> list[str]:
        """Paths of the routed Linears, in the model's order."""
        return [path for path, module in self.model.named_modules() if isinstance(module, RoutedLinear)]

    @property
    def decisions(self) -> list[Decision]:
        """Who answered each row of the last batch; empty before the first."""
        rows = 0 if self.features_BF is None else len(self.features_BF)
        weights_BE = self.state.weights_BE
        if weights_BE is None:
            return [Decision(None, {})] * rows
        decisions = []
        for row in weights_BE.expand(rows, -1).tolist():
            weights = {name: weight for name, weight in zip(self.pool.names, row, strict=True) if weight > 0}
            best = max(weights, key=weights.__getitem__, default=None)
            if best is not None and weights[best] < 1 - sum(weights.values()):
                best = None
            decisions.append(Decision(best, weights))
        return decisions

    @contextmanager
    def forced(self, name: str | None) -> Iterator[None]:
        """Sends every prompt to expert `name` (None: to the base) while the context lasts."""
        if name is not None and name not in self.pool.experts:
            raise PoolError(f"no expert {name!r} in the pool; there are: {', '.join(self.pool.names) or 'none'}")
        self._forced = (name,)
        try:
            yield
        finally:
            self._forced = None

    def detach(self) -> None:
        """Gives the base back exactly as it was."""
        self._reader.remove()
        for path, linear in self._replaced.items():
            self.model.set_submodule(path, linear)
        self._replaced.clear()
