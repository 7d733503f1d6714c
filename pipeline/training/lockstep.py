"""ZeRO-3: all ranks run the same modules in the same order, whether or not their rows have images.

A module whose weights are sharded gathers them from all ranks when it runs. A rank whose micro-batch has no image would
leave the vision tower out, and the ranks would wait in different collectives for ever.
"""

from typing import Any

import torch
from PIL import Image
from torch import nn

from pipeline.models.bases import Base
from pipeline.models.encoding import IMAGE_PLACEHOLDER, collate_for, encode, to_device


class VisionLockstep:
    """Runs the vision tower on a blank image in every forward pass that has none, and discards what it says.

    Just before the language model runs, where a pass with images has run the tower. To be made before the DeepSpeed
    engine, or after it; it does nothing where there is no tower (text models, image features that are read from disk).
    """

    def __init__(self, base: Base, device: str | torch.device) -> None:
        self._model: Any = base.model
        self._seen = False
        self._hooks: list[Any] = []
        parts = [base.model.get_submodule(path) for path in base.family.vision]
        if all(isinstance(part, nn.Identity) for part in parts):
            return
        question = [{"role": "user", "content": f"{IMAGE_PLACEHOLDER}?"}, {"role": "assistant", "content": ""}]
        row = encode(base.processor, question, [Image.new("RGB", (56, 56))], answer=False)
        batch = collate_for(base.processor, [row])
        self._blank = to_device({name: batch[name] for name in row.images}, device)
        language = base.model.get_submodule(base.family.language)
        self._hooks = [
            base.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            # Ahead of DeepSpeed's own hook, so that the order of modules is that of a pass with images.
            language.register_forward_pre_hook(self._before_language, prepend=True),
        ]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = kwargs.get("pixel_values") is not None

    @torch.no_grad()
    def _before_language(self, *_: Any) -> None:
        if not self._seen:
            self._model.base_model.get_image_features(**self._blank, return_dict=True)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
