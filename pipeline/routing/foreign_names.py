"""From the names in somebody else's adapter to the Linears of this base.

| written by | name of a Linear |
|---|---|
| PEFT with transformers from 4.52 on | `base_model.model.model.language_model.layers.0...` |
| before | `base_model.model.language_model.model.layers.0...`, for Qwen-VL `base_model.model.model.layers.0...` |
| PEFT on the language model alone | `base_model.model.model.layers.0...`, without a head `base_model.model.layers.0...` |
| InternVL's own code | `language_model.base_model.model.model.layers.0.attention.wo...` |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.routing.foreign_config import ForeignAdapterError

_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_LAYER = re.compile(r"(?P<head>(?:[a-z_]+\.)*?)layers\.(?P<number>\d+)\.(?P<rest>.+)")
HEADS = {
    "model.language_model.", "model.language_model.model.", "language_model.model.", "language_model.",
    "model.text_model.", "text_model.", "model.", "",
}  # fmt: skip
"""What stands before the layers of a language model."""
INTERNLM2 = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""Linears of InternVL2's own code that are Linears here."""


@dataclass(frozen=True)
class BaseLinears:
    """The Linears of a base, as far as adapters need to know them."""

    shapes: Mapping[str, tuple[int, int]]
    """Shape (O, D) of every Linear, by path."""
    language: str
    """Path of the language model."""
    routable: frozenset[str]
    """Paths of the Linears that a router can weigh: those in the language model's layers."""
    names: tuple[str, ...] = ()
    """Names that the base is known by: hub id, or name in the registry."""
    is_public: bool = False
    """Whether the first of them is one that others use too."""

    @property
    def layers(self) -> set[int]:
        """Numbers of the language model's layers."""
        return {int(match["number"]) for path in self.routable if (match := _LAYER.search(path))}


@dataclass(frozen=True)
class Half:
    """A or B of a Linear's LoRA."""

    key: str
    name: str
    """PEFT's name of the Linear."""
    path: str
    """Its path in this base."""
    half: str


def halves_of(file: Path, keys: list[str], linears: BaseLinears) -> list[Half]:
    """Returns what the tensors of an adapter are to this base; raises ForeignAdapterError for any that is none of its LoRA."""
    found: list[Half] = []
    heads: dict[str, str] = {}
    adapters: dict[str | None, str] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ForeignAdapterError(
                f"{file}: tensor {key!r} {_what(key)}; train a plain LoRA on the language model's Linears"
            )
        name = match["name"].replace("base_model.model.", "")
        head, path = _path(file, key, name, linears)
        heads.setdefault(head, key)
        adapters.setdefault(match["adapter"], key)
        found.append(Half(key, name, path, match["half"]))
    for what, several in (("base's language model", heads), ("adapter", adapters)):
        if len(several) > 1:
            first, second, *_ = several.values()
            raise ForeignAdapterError(
                f"{file}: names of more than one {what}: {first!r} and {second!r}; save one adapter alone"
            )
    return found


def _path(file: Path, key: str, name: str, linears: BaseLinears) -> tuple[str, str]:
    """Returns what stands before the layers in a Linear's name, and its path in this base."""
    match = _LAYER.fullmatch(name)
    if name in linears.shapes and name not in linears.routable:
        raise _outside(file, key)
    if match is None or match["head"] not in HEADS:
        if re.search(r"vis(ion|ual)|projector|connector|mlp1|lm_head", name):
            raise _outside(file, key)
        raise _unknown(file, key, linears)
    rest = INTERNLM2.get(match["rest"], match["rest"])
    path = f"{linears.language}.layers.{match['number']}.{rest}"
    if path in linears.routable:
        return match["head"], path
    if int(match["number"]) not in linears.layers:
        raise ForeignAdapterError(
            f"{file}: tensor {key!r} is of layer {match['number']}, and the base has {len(linears.layers)} layers: it is an "
            "adapter of another base; name that base, or another adapter"
        )
    if rest == "attention.wqkv":
        raise ForeignAdapterError(
            f"{file}: tensor {key!r} is of InternVL's own code, where query, key and value are one Linear; train on the "
            "converted base (pointsman convert-internvl2), or name an adapter that was"
        )
    raise _unknown(file, key, linears)


def _what(key: str) -> str:
    """Says what a tensor is that is no A or B."""
    if "lora_embedding" in key:
        return "is a LoRA of embeddings, which cannot be routed"
    if "lora_magnitude" in key:
        return "is DoRA's, which cannot be routed"
    if key.endswith(".bias"):
        return "is a bias, which cannot be routed"
    if "lora_" not in key and key.endswith(".weight"):
        return "is a whole layer (modules_to_save), which cannot be routed"
    return "is no A or B of a LoRA"


def _outside(file: Path, key: str) -> ForeignAdapterError:
    return ForeignAdapterError(
        f"{file}: tensor {key!r} is outside the language model's layers, where the router cannot weigh it; train with "
        "target_modules of the language model alone"
    )


def _unknown(file: Path, key: str, linears: BaseLinears) -> ForeignAdapterError:
    example = f"base_model.model.{min(linears.routable)}.lora_A.weight"
    return ForeignAdapterError(
        f"{file}: tensor {key!r} is of no Linear of the base, whose tensors are called such as {example!r}; name the base that "
        "it was trained on, or another adapter"
    )
