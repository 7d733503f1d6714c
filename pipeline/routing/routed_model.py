"""A base with a pool attached: `generate` and `forward` as before, routed inside.

The base's Linears are wrapped, not changed: `detach` puts the very same modules back. The decision is taken at prefill,
from what the language model is about to read, and holds while the answer is generated (with KV cache). Shapes: B rows,
T tokens, D width, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.features import project, prompt_features
from pipeline.routing.layer import Route, RoutedLinear, Slot
from pipeline.routing.pool import Pool, PoolError
from pipeline.routing.prompt_router import PromptRouter


@dataclass(frozen=True)
class Decision:
    """Who answered a prompt."""

    expert: str | None
    """The expert with the largest weight; None where the base answered."""
    weights: dict[str, float]
    """Weight of each expert; for the token router its mean over the prompt's tokens and all Linears."""


class PromptReader:
    """Takes down the features of every prompt that a model is about to read, at prefill.

    Works on any transformers VLM whose inner model merges image tokens and then calls `language_model(inputs_embeds=...)`.
    `listener` gets the features (B, 3 D) and the mask of real tokens (B, T), before the language model runs.
    """

    def __init__(self, model: Any, listener: Any) -> None:
        self.listener = listener
        self._image_token = model.config.image_token_id
        self._masks: tuple[Tensor, Tensor] | None = None
        self._hooks = [
            model.model.register_forward_pre_hook(self._outer, with_kwargs=True),
            model.model.language_model.register_forward_pre_hook(self._inner, with_kwargs=True),
        ]
        self.prompt_mask: Tensor | None = None
        """Set to (B, T) to count only these tokens as prompt (training rows contain the answer as well)."""

    def _outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise PoolError("routing needs input_ids (image tokens are recognised by their id), not inputs_embeds")
        attention = kwargs.get("attention_mask")
        real = torch.ones_like(input_ids) if attention is None else attention[:, -input_ids.shape[1] :]
        image = input_ids == self._image_token
        prompt = real.bool() if self.prompt_mask is None else self.prompt_mask.bool()
        self._masks = image & prompt, prompt & ~image

    def _inner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self.listener(None, None)
            return
        assert self._masks is not None, "the inner model runs before the language model"
        image_BT, text_BT = self._masks
        self.listener(prompt_features(kwargs["inputs_embeds"], image_BT, text_BT), image_BT | text_BT)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


class RoutedModel:
    """A pool attached to a base."""

    def __init__(self, model: Any, pool: Pool) -> None:
        self.model = model
        self.pool = pool
        settings = pool.router
        experts = list(pool.experts.values())
        self.route = Route(
            mode="token" if settings.kind == "token" and experts else "row",
            top_k=settings.top_k,
            temperature=settings.temperature,
        )
        self.router = PromptRouter([e.statistics for e in experts], pool.null, shrinkage=settings.shrinkage)
        self._forced: int | None = None
        paths = sorted({path for expert in experts for path in expert.adapters})
        self._replaced: dict[str, nn.Linear] = {path: model.get_submodule(path) for path in paths}
        for path, linear in self._replaced.items():
            if not isinstance(linear, nn.Linear):
                raise PoolError(f"{path} is {type(linear).__name__}, not a Linear; is another pool still attached?")
        for path, linear in self._replaced.items():
            slots = [
                Slot(i, a.a_RD, a.b_OR, a.scaling, expert.vectors.get(path, torch.zeros(a.a_RD.shape[1])))
                for i, expert in enumerate(experts)
                if (a := expert.adapters.get(path)) is not None
            ]
            model.set_submodule(path, RoutedLinear(linear, slots, self.route, len(experts)))
        self._reader = PromptReader(model, self._decide)

    @torch.no_grad()
    def _decide(self, features_BS: Tensor | None, tokens_BT: Tensor | None) -> None:
        """Chooses at prefill; keeps the choice while decoding (features None)."""
        self.route.tokens_BT = tokens_BT
        if features_BS is None:
            return
        self.route.votes_BE = None
        forced = self._forced if self.pool.experts else -1
        if forced is not None:
            weights_BE = torch.zeros(len(features_BS), len(self.pool.experts))
            if forced >= 0:
                weights_BE[:, forced] = 1
        elif self.route.mode == "row":
            width = len(self.router.experts[0].sum_F)
            weights_BE = self.router.weights(project(features_BS, width))
        else:
            return
        self.route.weights_BE = weights_BE.to(features_BS.device)

    @property
    def decisions(self) -> list[Decision]:
        """Who answered each row of the last batch."""
        names = self.pool.names
        if self.route.mode == "row":
            weights_BE = self.route.weights_BE
        else:
            weights_BE = self.route.votes_BE
            if weights_BE is not None:
                weights_BE = weights_BE / weights_BE.sum(-1, keepdim=True)
        if weights_BE is None:
            return []
        decisions = []
        for row in weights_BE.tolist():
            weights = {name: weight for name, weight in zip(names, row, strict=True) if weight > 0}
            decisions.append(Decision(max(weights, key=weights.__getitem__) if weights else None, weights))
        return decisions

    @contextmanager
    def forced(self, name: str | None) -> Iterator[None]:
        """Sends every prompt to expert `name` (None: to the base) while the context lasts."""
        if name is not None and name not in self.pool.experts:
            raise PoolError(f"no expert {name!r} in the pool; there are: {', '.join(self.pool.names) or 'none'}")
        before = self.route.mode
        self._forced = -1 if name is None else self.pool.names.index(name)
        self.route.mode = "row"
        try:
            yield
        finally:
            self._forced, self.route.mode = None, before

    def detach(self) -> None:
        """Gives the base back exactly as it was."""
        self._reader.remove()
        for path, linear in self._replaced.items():
            self.model.set_submodule(path, linear)
        self._replaced.clear()
