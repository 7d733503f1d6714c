"""Reads prompt features where they arise: in front of the language model, at prefill.

Shapes: B rows, T tokens, D width.
"""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.features import prompt_features
from pipeline.routing.pool import PoolError


class _Pass(threading.local):
    """What a thread's forward pass has brought so far, and which of its tokens are prompt."""

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.attention: Any = None
        self.cache: Any = None
        self.prompt_mask: Tensor | None = None


class PromptFeatureHook:
    """Takes down the features of every prompt that a model is about to read, at prefill.

    Works on any transformers model whose decoder gets merged embeddings (VLMs) or token ids (text models).
    `listener` gets the features (B, 5 D) and the mask of real tokens (B, T), before the language model runs; None twice
    where the KV cache holds the prompt already. Passes may run in several threads.
    """

    def __init__(self, model: Any, listener: Any) -> None:
        self.listener = listener
        self._image_token: int | None = getattr(model.config, "image_token_id", None)
        self._pass = _Pass()
        self._hooks = [
            model.register_forward_pre_hook(self._outer, with_kwargs=True),
            model.get_decoder().register_forward_pre_hook(self._inner, with_kwargs=True),
        ]

    @property
    def prompt_mask(self) -> Tensor | None:
        """Set to (B, T) to count only these tokens as prompt (training rows contain the answer as well); by thread."""
        return self._pass.prompt_mask

    @prompt_mask.setter
    def prompt_mask(self, mask_BT: Tensor | None) -> None:
        self._pass.prompt_mask = mask_BT

    @property
    def cache(self) -> Any:
        """The KV cache of this thread's pass, for the listener."""
        return self._pass.cache

    def _outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise PoolError("routing needs input_ids (image tokens are recognised by their id), not inputs_embeds")
        self._pass.input_ids, self._pass.attention = input_ids, kwargs.get("attention_mask")

    def _inner(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids, attention, cache = self._pass.input_ids, self._pass.attention, kwargs.get("past_key_values")
        assert input_ids is not None, "the model begins before its decoder"
        self._pass.input_ids, self._pass.attention, self._pass.cache = None, None, cache
        try:
            if cache is not None and cache.get_seq_length() > 0:
                self.listener(None, None)
                return
            image_BT, text_BT = self._masks(input_ids, attention)
            embeds_BTD = kwargs.get("inputs_embeds")
            if embeds_BTD is None:
                embeds_BTD = module.get_input_embeddings()(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
            image_BT, text_BT = image_BT.to(embeds_BTD.device), text_BT.to(embeds_BTD.device)
            self.listener(prompt_features(embeds_BTD, image_BT, text_BT), image_BT | text_BT)
        finally:
            self._pass.cache = None

    def _masks(self, input_ids: Tensor, attention: Any) -> tuple[Tensor, Tensor]:
        """Returns which tokens of the prompt stand for images, and which are text (B, T)."""
        real = real_tokens(input_ids, attention)
        image = torch.zeros_like(input_ids, dtype=torch.bool)
        if self._image_token is not None:
            image = input_ids == self._image_token
        prompt = real if self.prompt_mask is None else self.prompt_mask.bool()
        return image & prompt, prompt & ~image

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def real_tokens(input_ids: Tensor, attention: Any) -> Tensor:
    """Returns which tokens of a prompt are not padding (B, T), from any mask that transformers gives a model.

    Beside (B, T): None, (B, 1, T, K) of bool or added to the scores, or one of these for each kind of attention, as for
    caches of a fixed size.
    """
    if isinstance(attention, Mapping):
        attention = next((mask for mask in attention.values() if mask is not None), None)
    if attention is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention.dim() == 4:  # every token that is not padding sees itself
        own_BT = attention[:, 0].diagonal(dim1=-2, dim2=-1)
        return own_BT if own_BT.dtype == torch.bool else own_BT == 0
    return attention[:, -input_ids.shape[1] :].bool()
