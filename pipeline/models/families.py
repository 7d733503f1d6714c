"""Families of bases, in one table.

The `model_type` of a configuration determines the family. A line here makes another of transformers' classes a base: path of
its language model, paths of its vision parts, rule for its processor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.errors import UserError
from pipeline.models import processors

PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj"
"""The Linears of a decoder layer in transformers' text models: Llama, Qwen, Mistral, Gemma; fused ones in Phi-3."""


class FamilyError(UserError):
    """A model type that is not in the table; the message says what to add."""


@dataclass(frozen=True)
class Family:
    """A family of bases."""

    language: str
    """Path of the language model."""
    vision: tuple[str, ...]
    """Paths of the vision parts, projector included; none for text models."""
    processor: Callable[..., Any]
    """Makes its processor."""
    supports_image_cache: bool = True
    """Whether its forward pass accepts cached image embeddings (`data.vision_cache`)."""

    @property
    def linears(self) -> str:
        """Regular expression of the Linears that an expert adapts: all in the language model's layers.

        Anchored, since vision towers have projections of the same names.
        """
        return rf"{self.language.replace('.', chr(92) + '.')}\.layers\..*\.({PROJECTIONS})"


_QWEN = ("model.visual",)
_IDEFICS = ("model.vision_model", "model.connector")
_TOWER = ("model.vision_tower", "model.multi_modal_projector")

FAMILIES = {
    "internvl": Family("model.language_model", _TOWER, processors.internvl),
    "llava": Family("model.language_model", _TOWER, processors.llava),
    "qwen2_vl": Family("model.language_model", _QWEN, processors.qwen2_5_vl),
    "qwen2_5_vl": Family("model.language_model", _QWEN, processors.qwen2_5_vl),
    # Qwen3-VL feeds its vision tower's inner layers into the language model as well.
    "qwen3_vl": Family("model.language_model", _QWEN, processors.qwen3_vl, supports_image_cache=False),
    "idefics3": Family("model.text_model", _IDEFICS, processors.idefics3),
    "smolvlm": Family("model.text_model", _IDEFICS, processors.smolvlm),
}
"""Vision-language families by `model_type`."""

TEXT = Family("model", (), processors.text)
"""Text models that transformers loads with AutoModelForCausalLM and whose layers are named as Llama's."""

TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "smollm3", "olmo2", "granite")
"""Their model types."""


def family_of(config: Any) -> Family:
    """Returns the family of a transformers configuration; raises FamilyError for one that is not in the table."""
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in TEXT_TYPES:
        return TEXT
    is_text = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    what = "a text model" if is_text else "no text model that transformers knows"
    raise FamilyError(
        f"model_type {model_type!r} is {what} and in no family; there are: {', '.join((*FAMILIES, *TEXT_TYPES))}. Add a line "
        "to FAMILIES (or its name to TEXT_TYPES) in pipeline/models/families.py: path of the language model, paths of the "
        "vision parts, rule for the processor. An original InternVL-2 folder (internvl_chat) is converted first: pointsman "
        "convert-internvl2 SRC DST"
    )
