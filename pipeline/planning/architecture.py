"""Architecture of a base from its configuration: parts, counts and widths.

The model is built on PyTorch's meta device, which holds shapes only: an 8B base takes two seconds and no memory, and no
weights are needed. Counts are those of the modules that training loads.
"""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.config import BaseModelConfig
from pipeline.models.checkpoints import BaseError
from pipeline.models.families import TEXT, Family, FamilyError, family_of
from pipeline.models.internvl2.config import convert_config, read_config
from pipeline.models.internvl2.source import ConversionError
from pipeline.models.target_modules import adapted_paths
from pipeline.models.tiny import TINY_BASE

VISION, PROJECTOR, LANGUAGE, HEAD = PARTS = ("vision tower", "projector", "language model", "head")
"""The parts of a base; embeddings belong to the language model, and a head that is tied to them counts as 0."""

READS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "heads": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj"),
    "inner": ("down_proj",),
}
"""The four inputs of a decoder layer, and the Linears that read them: the normalised residual before attention, the output of
the attention heads, the normalised residual before the MLP, and the MLP's inner product."""

FREE_SIDE = 448
"""Side in pixels of one tile where a family takes images of any size (Qwen-VL): InternVL's tile."""


@dataclass(frozen=True)
class AdaptedLinear:
    """A Linear that an expert adapts."""

    path: str
    reads: str
    """Which input of its layer it reads; see `READS`."""
    layer: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Decoder:
    """The language model's layers and head."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_width: int
    inner_width: int
    """Width of the gated MLP."""
    vocabulary: int
    norm_widths: tuple[int, ...]
    """Widths of the norms in a layer, in order; those of queries and keys over all heads."""
    matrices: int
    """Parameters in all Linears of all layers: each is one multiplication and one addition per token."""


@dataclass(frozen=True)
class Tower:
    """The vision tower and its projector."""

    width: int
    layers: int
    heads: int
    inner_width: int
    positions: int
    """Patches of a tile, class token included."""
    pixels: int
    """Numbers in a tile, three to a pixel."""
    matrices: int
    """Parameters in the tower's Linears and patch embedding."""
    projector_matrices: int
    """Parameters in the projector's Linears."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a base that planning needs."""

    model_type: str
    """transformers' `model_type`."""
    parameters: Mapping[str, int]
    """By part; see `PARTS`."""
    adapted: tuple[AdaptedLinear, ...]
    decoder: Decoder
    tower: Tower | None
    """None for text models."""
    tile_tokens: int
    """Tokens per tile; 0 for text models."""
    longest: int
    """Maximum positions of the language model, in tokens."""
    cacheable: bool
    """Whether image embeddings can be cached; see `families`."""

    @property
    def total(self) -> int:
        """Parameters of the base, all of them frozen."""
        return sum(self.parameters.values())

    def adapter_parameters(self, rank: int) -> int:
        """Returns the parameters of one expert's LoRA: r (D + O) for each adapted Linear (arXiv 2106.09685, section 4.1)."""
        return sum(rank * (linear.inputs + linear.outputs) for linear in self.adapted)

    @property
    def vector_parameters(self) -> int:
        """Parameters of one expert's routing vectors: D for each adapted Linear."""
        return sum(linear.inputs for linear in self.adapted)


def base_configuration(base: BaseModelConfig, file: Path | None = None) -> Any:
    """Returns the configuration of a base: that in `file`, or else the config.json in the folder `base.path`.

    An original InternVL2's configuration is converted on the fly. Raises BaseError.
    """
    if file is None:
        file = (TINY_BASE if base.path == "tiny" else Path(base.path).expanduser()) / "config.json"
        if not file.is_file():
            hub = not base.path.startswith((".", "/", "~")) and "://" not in base.path
            where = f"`hf download {base.path} config.json` brings it" if hub else "jobs/configs/bases has InternVL2's"
            raise BaseError(
                f"base.path: {base.path} is no folder with a config.json on this machine. A plan reads only that file: "
                f"give it with --base-config path/to/config.json ({where})"
            )
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise BaseError(f"--base-config {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BaseError(f"{file}: not valid JSON: {error}") from None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type == "internvl_chat":
        return _converted(values, file)
    try:
        family_of(SimpleNamespace(model_type=model_type))
        return CONFIG_MAPPING[model_type].from_dict(values)
    except (FamilyError, ValueError, TypeError) as error:
        raise BaseError(f"{file}: {error}") from None


def _converted(values: Mapping[str, Any], file: Path) -> Any:
    try:
        fields = read_config(values, file)
        tied = bool(fields.section("llm_config").values.get("tie_word_embeddings", False))
        return convert_config(fields, image_token_id=0, tied=tied)
    except ConversionError as error:
        raise BaseError(str(error)) from None


def architecture_of(config: Any, targets: str = "auto") -> Architecture:
    """Returns parts, counts and widths of a configuration; `targets` as `expert.target_modules`.

    Raises ConfigError where `targets` matches nothing, BaseError where it matches something outside the language model's
    layers.
    """
    family = family_of(config)
    auto_class = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    with torch.device("meta"):
        # A copy: building a model writes its choices into the configuration, which may be that of a loaded one.
        model = auto_class.from_config(deepcopy(config), attn_implementation="eager")
    parameters = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # tied weights come once
        parameters[_part(name, family)] += parameter.numel()
    text = config.get_text_config()
    tower = _tower(config, model, family) if family.vision else None
    return Architecture(
        model_type=config.model_type,
        parameters=parameters,
        adapted=_adapted(model, family, targets),
        decoder=_decoder(text, model.get_submodule(f"{family.language}.layers")),
        tower=tower,
        tile_tokens=_tile_tokens(config) if family.vision else 0,
        longest=text.max_position_embeddings,
        cacheable=bool(family.vision) and family.supports_image_cache,
    )


def _part(name: str, family: Family) -> str:
    if name.startswith(family.vision):
        return PROJECTOR if _is_projector(name) else VISION
    return HEAD if name.startswith("lm_head.") else LANGUAGE


def _is_projector(name: str) -> bool:
    return any(word in name for word in ("projector", "connector", "merger"))


def _adapted(model: nn.Module, family: Family, targets: str) -> tuple[AdaptedLinear, ...]:
    readers = {name: reads for reads, names in READS.items() for name in names}
    inside = re.compile(rf"{re.escape(family.language)}\.layers\.(\d+)\..*?([^.]+)")
    adapted = []
    for path in adapted_paths(model, family, targets):
        module: Any = model.get_submodule(path)
        match = inside.fullmatch(path)
        if match is None or match[2] not in readers:
            raise BaseError(
                f"expert.target_modules: {targets!r} matches {path}, which training would adapt, but a plan knows adapters on "
                f"the projections of the language model's layers only ({', '.join(sorted(readers))})"
            )
        adapted.append(AdaptedLinear(path, readers[match[2]], int(match[1]), module.in_features, module.out_features))
    return tuple(adapted)


def _matrices(module: nn.Module, *, where: str = "") -> int:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(m.weight.numel() for name, m in module.named_modules() if isinstance(m, kinds) and where in name)


def _decoder(text: Any, layers: nn.ModuleList) -> Decoder:
    heads, key_value_heads = text.num_attention_heads, text.num_key_value_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    norms = []
    for name, module in layers[0].named_modules():
        if type(module).__name__.endswith("Norm"):
            several = {"q_norm": heads, "k_norm": key_value_heads}.get(name.rpartition(".")[2], 1)
            norms.append(module.weight.numel() * (several if module.weight.numel() == head_width else 1))
    return Decoder(
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        inner_width=text.intermediate_size,
        vocabulary=text.vocab_size,
        norm_widths=tuple(norms),
        matrices=_matrices(layers),
    )


def _side(value: Any) -> int:
    """Returns the side of a square that configurations give as a number or as a pair."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def _tower(config: Any, model: nn.Module, family: Family) -> Tower:
    vision = config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden_size is the language model's
    side = _side(getattr(vision, "image_size", FREE_SIDE))
    names = [name for name, _ in model.named_parameters() if name.startswith(family.vision)]
    class_token = any(name.endswith(("cls_token", "class_embedding")) for name in names)
    modules = {path: model.get_submodule(path) for path in family.vision}
    projector = sum(_matrices(m, where="" if _is_projector(path) else "merger") for path, m in modules.items())
    return Tower(
        width=width,
        layers=getattr(vision, "num_hidden_layers", None) or vision.depth,
        heads=getattr(vision, "num_attention_heads", None) or vision.num_heads,
        inner_width=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
        positions=(side // _side(vision.patch_size)) ** 2 + class_token,
        pixels=3 * side * side,
        matrices=sum(map(_matrices, modules.values())) - projector,
        projector_matrices=projector,
    )


def _tile_tokens(config: Any) -> int:
    """Returns the tokens per tile: from the configuration, or patches divided by the square of the merge size."""
    if getattr(config, "image_seq_length", None):
        return int(config.image_seq_length)
    vision = config.vision_config
    merged = int(getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1)
    return (_side(getattr(vision, "image_size", FREE_SIDE)) // _side(vision.patch_size) // merged) ** 2
