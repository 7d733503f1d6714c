"""From the tensors of the original checkpoint to those of transformers.

The plan is made backwards: each tensor of the new model names its origin, and tensors with the same origin are parts of it.
So every tensor of the new model has an origin, and comparing origins with the folder finds missing and surplus tensors.

| original | here |
|---|---|
| `vision_model...attn.qkv`: query, key, value one after the other | `vision_tower...attention.{q,k,v}_proj` |
| `norm1`, `norm2`, `ls1`, `ls2` | `layernorm_before`, `layernorm_after`, `lambda_1`, `lambda_2` |
| `mlp1.0`, `mlp1.1`, `mlp1.3` | `multi_modal_projector.layer_norm`, `linear_1`, `linear_2` |
| InternLM2: `attention.wqkv`, grouped by key-value head; `wo` | `self_attn.{q,k,v}_proj`, `o_proj` |
| InternLM2: `feed_forward.w1`, `w3`, `w2` | `mlp.gate_proj`, `up_proj`, `down_proj` |
| Phi-3: `qkv_proj`, `gate_up_proj`, one after the other | the same as InternLM2's |
| Llama, Qwen2 | as they are |

Shapes: O output width, D input width, G query heads of a key-value head, K key-value heads, H width of a head.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from pipeline.models.internvl2.source import ConversionError, Stored

VISION = {
    r"vision_tower\.embeddings\.cls_token": "vision_model.embeddings.class_embedding",
    r"vision_tower\.embeddings\.position_embeddings": "vision_model.embeddings.position_embedding",
    r"vision_tower\.embeddings\.patch_embeddings\.projection\.": "vision_model.embeddings.patch_embedding.",
    r"vision_tower\.encoder\.layer\.": "vision_model.encoder.layers.",
    r"\.attention\.[qkv]_proj\.": ".attn.qkv.",
    r"\.attention\.projection_layer\.": ".attn.proj.",
    r"\.attention\.([qk])_norm\.": r".attn.\1_norm.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.lambda_": ".ls",
}
PROJECTOR = {
    r"multi_modal_projector\.layer_norm\.": "mlp1.0.",
    r"multi_modal_projector\.linear_1\.": "mlp1.1.",
    r"multi_modal_projector\.linear_2\.": "mlp1.3.",
}
LANGUAGE = {
    "InternLM2ForCausalLM": {
        r"\.embed_tokens\.": ".tok_embeddings.",
        r"\.lm_head\.": ".output.",
        r"\.self_attn\.[qkv]_proj\.": ".attention.wqkv.",
        r"\.self_attn\.o_proj\.": ".attention.wo.",
        r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
        r"\.mlp\.up_proj\.": ".feed_forward.w3.",
        r"\.mlp\.down_proj\.": ".feed_forward.w2.",
        r"\.input_layernorm\.": ".attention_norm.",
        r"\.post_attention_layernorm\.": ".ffn_norm.",
    },
    "Phi3ForCausalLM": {
        r"\.self_attn\.[qkv]_proj\.": ".self_attn.qkv_proj.",
        r"\.mlp\.(gate|up)_proj\.": ".mlp.gate_up_proj.",
    },
    "Qwen2ForCausalLM": {},
    "LlamaForCausalLM": {},
}
"""Language towers by architecture: patterns from new names to original ones."""

HEADS = {"InternLM2ForCausalLM": "language_model.output.weight"}
"""Name of the original output layer, where it is not `language_model.lm_head.weight`."""


@dataclass(frozen=True)
class Move:
    """One original tensor and the new tensors made of it."""

    source: str
    """Its original name."""
    targets: tuple[str, ...]
    """Names in the new files, in the order of their rows."""
    shapes: tuple[torch.Size, ...]
    """Their shapes."""
    head_width: int | None = None
    """Width H of a head, where rows are grouped by key-value head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that the original tensor must have."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the new tensors by name: views of the original one where its rows are in order."""
        if self.head_width is None:
            parts: Iterable[Tensor] = tensor.split([shape[0] for shape in self.shapes])
        else:
            parts = split_grouped(tensor, self.shapes[0][0] // self.shapes[1][0], self.head_width)
        return {name: part.contiguous() for name, part in zip(self.targets, parts, strict=True)}


def split_grouped(wqkv: Tensor, groups: int, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits InternLM2's fused projection: query (K G H, D), key (K H, D) and value (K H, D); or, of biases, without D.

    The fused rows (K (G + 2) H, D) are, for each key-value head in turn, its G query heads, its key, its value
    (https://github.com/OpenGVLab/InternVL, internvl_chat/internvl/model/internlm2/modeling_internlm2.py). Query heads stay
    in order, and that is the order in which Llama repeats key-value heads.
    """
    heads = wqkv.unflatten(0, (-1, groups + 2, head_width))
    return heads[:, :groups].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)


def saved_name(name: str) -> str:
    """Returns the name that transformers writes into files for a parameter of InternVLForConditionalGeneration."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return re.sub(r"^language_model\.", "language_model.model.", name)


def conversion_plan(config: InternVLConfig, architecture: str) -> list[Move]:
    """Returns how to fill every tensor of the model that `config` describes, in the model's order.

    That order, query, key, value and gate, up, is also the one in which fused tensors hold their parts.
    """
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    rules = VISION | PROJECTOR
    groups: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = source = saved_name(name)
        for pattern, original in (LANGUAGE[architecture] if target.startswith("language_model.") else rules).items():
            source = re.sub(pattern, original, source)
        groups.setdefault(source, []).append((target, tensor.shape))
    text = config.get_text_config()
    moves = []
    for source, parts in groups.items():
        targets, shapes = zip(*parts, strict=True)
        moves.append(Move(source, targets, shapes, text.head_dim if ".wqkv." in source else None))
    return moves


def check_complete(moves: Iterable[Move], stored: Mapping[str, Stored], folder: str) -> None:
    """Raises ConversionError unless the folder holds exactly the tensors of the plan, in their shapes."""
    expected = {move.source: move for move in moves}
    if missing := expected.keys() - stored.keys():
        raise ConversionError(
            f"{folder}: {_some(missing)} missing; the folder is incomplete or config.json is another model's"
        )
    if surplus := stored.keys() - expected.keys():
        raise ConversionError(
            f"{folder}: {_some(surplus)} not known; is it InternVL2, with its LoRA merged and config.json its own?"
        )
    for name, move in expected.items():
        if stored[name].shape != move.shape:
            raise ConversionError(
                f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, config.json says {move.shape}; they "
                "belong to different models"
            )


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"tensor {first} is" if not rest else f"tensors {first} and {len(rest)} more are"
