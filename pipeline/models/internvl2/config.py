"""From the original config.json to transformers' InternVLConfig.

Language towers and their classes here; afterwards all have q, k, v, o, gate, up and down as separate Linears:

| original | sizes | here |
|---|---|---|
| InternLM2ForCausalLM | 2B, 8B, 26B | Llama: the same mathematics once `wqkv` is taken apart |
| Qwen2ForCausalLM | 1B | Qwen2 |
| Phi3ForCausalLM | 4B | Llama, for the same reason; transformers' own Phi3 would keep query, key and value fused |
| LlamaForCausalLM | 40B, 76B | Llama |

Rotary embeddings. `dynamic` (InternLM2, factor 2 or 3) is the same formula in both: base theta (f L / M - f + 1)^(d / (d - 2))
for a sequence of length L beyond M = `max_position_embeddings` (32,768), theta up to there. They differ beyond it only:
InternLM2 counts padding into L, and keeps the largest base it ever needed for all later sequences; transformers counts
positions, and goes back to theta. `su` (Phi-3) is `longrope`: one list of factors up to 4,096 positions, another beyond.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from pipeline.models.internvl2.source import ConversionError

QK_NORM_EPS = 1e-6
"""Epsilon of transformers' norms of queries and keys, whatever `layer_norm_eps` is."""


class Fields:
    """A group of config.json; a missing field or one without counterpart raises ConversionError."""

    def __init__(self, values: Mapping[str, Any], file: Path, group: str = "") -> None:
        self.values, self.file, self.group = values, file, group

    def error(self, field: str, reason: str) -> ConversionError:
        """Returns the error that names a field."""
        return ConversionError(f"{self.file}: {self.group}{field}: {reason}")

    def required(self, field: str) -> Any:
        """Returns a field that must be there."""
        if self.values.get(field) is None:
            raise self.error(field, "missing; take the config.json that was published with the weights")
        return self.values[field]

    def section(self, field: str) -> "Fields":
        """Returns a group within this one."""
        values = self.required(field)
        if not isinstance(values, dict):
            raise self.error(field, f"must be a group of fields, found {values!r}")
        return Fields(values, self.file, f"{self.group}{field}.")

    def one_of(self, field: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """Returns a field if its value is `allowed`; `default` is the original code's default."""
        value = self.values.get(field, default)
        if value not in allowed:
            listed = " or ".join(repr(v) for v in allowed)
            raise self.error(
                field, f"{value!r} has no counterpart in transformers' InternVL; only {listed} is converted"
            )
        return value


def read_config(values: Mapping[str, Any], file: Path) -> Fields:
    """Returns config.json's fields; raises ConversionError unless they are those of an original InternVL2."""
    fields = Fields(values, file)
    if values.get("model_type") != "internvl_chat":
        model_type = values.get("model_type")
        hint = (
            "it is in transformers' format already" if model_type == "internvl" else "give the folder of an InternVL2"
        )
        raise fields.error("model_type", f"{model_type!r}, not 'internvl_chat'; {hint}")
    fields.one_of("select_layer", (-1,), -1)
    fields.one_of("ps_version", ("v2",), "v1")
    fields.one_of("pad2square", (False,), False)
    for field in ("use_backbone_lora", "use_llm_lora"):
        if values.get(field, 0):
            raise fields.error(field, f"{values[field]}: merge the LoRA into the weights first")
    if values.get("dynamic_image_size", False):
        fields.one_of("use_thumbnail", (True,), False)
    return fields


def image_side(fields: Fields) -> int:
    """Returns the side of a tile in pixels."""
    side = fields.section("vision_config").required("image_size")
    if (forced := fields.values.get("force_image_size")) not in (None, side):
        raise fields.error(
            "force_image_size", f"{forced}, but the vision tower has positions for {side}; not converted"
        )
    return side


def tokens_per_tile(fields: Fields) -> int:
    """Returns the tokens per tile: (side / patch x downsample ratio) squared, 256 for 448 pixels."""
    patch = fields.section("vision_config").required("patch_size")
    return int((image_side(fields) // patch * fields.required("downsample_ratio")) ** 2)


def architecture(fields: Fields) -> str:
    """Returns the class of the original language tower."""
    names = fields.section("llm_config").required("architectures")
    return str(names[0] if isinstance(names, list) and names else names)


def convert_config(fields: Fields, *, image_token_id: int, tied: bool) -> InternVLConfig:
    """Returns the configuration in transformers' terms; `tied`: no output layer is stored beside the embedding."""
    return InternVLConfig(
        vision_config=_vision(fields.section("vision_config")).to_dict(),
        text_config=_text(fields, tied).to_dict(),
        image_token_id=image_token_id,
        image_seq_length=tokens_per_tile(fields),
        downsample_ratio=fields.required("downsample_ratio"),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # drops the class token
        tie_word_embeddings=tied,
        architectures=["InternVLForConditionalGeneration"],
    )


def _vision(fields: Fields) -> InternVLVisionConfig:
    """InternViT-300M (LayerNorm, biases) or InternViT-6B (RMSNorm, norms of query and key, no bias on them).

    Stochastic depth only matters in its training and is left out.
    """
    required, values = fields.required, fields.values
    qk_norm = values.get("qk_normalization", True)
    if qk_norm and values.get("layer_norm_eps", 1e-6) != QK_NORM_EPS:
        raise fields.error(
            "layer_norm_eps", f"{values['layer_norm_eps']}; with qk_normalization only 1e-6 is converted"
        )
    return InternVLVisionConfig(
        hidden_size=required("hidden_size"),
        num_hidden_layers=required("num_hidden_layers"),
        num_attention_heads=required("num_attention_heads"),
        intermediate_size=required("intermediate_size"),
        image_size=required("image_size"),
        patch_size=required("patch_size"),
        num_channels=values.get("num_channels", 3),
        hidden_act=values.get("hidden_act", "gelu"),
        norm_type=fields.one_of("norm_type", ("layer_norm", "rms_norm"), "rms_norm"),
        layer_norm_eps=values.get("layer_norm_eps", 1e-6),
        attention_bias=values.get("qkv_bias", False),
        use_qk_norm=qk_norm,
        attention_dropout=values.get("attention_dropout", 0.0),
        projection_dropout=values.get("dropout", 0.0),
        initializer_range=values.get("initializer_range", 0.02),
        layer_scale_init_value=values.get("initializer_factor", 0.1),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # no LayerNorm after the last layer
    )


def _text(config: Fields, tied: bool) -> PreTrainedConfig:
    fields = config.section("llm_config")
    required, values = fields.required, fields.values
    common = {
        "vocab_size": required("vocab_size"),
        "hidden_size": required("hidden_size"),
        "intermediate_size": required("intermediate_size"),
        "num_hidden_layers": required("num_hidden_layers"),
        "num_attention_heads": required("num_attention_heads"),
        "num_key_value_heads": values.get("num_key_value_heads") or required("num_attention_heads"),
        "hidden_act": required("hidden_act"),
        "max_position_embeddings": required("max_position_embeddings"),
        "rms_norm_eps": required("rms_norm_eps"),
        "rope_parameters": _rope(fields),
        "initializer_range": values.get("initializer_range", 0.02),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": values.get("eos_token_id"),
        "pad_token_id": values.get("pad_token_id"),
        "tie_word_embeddings": tied,
    }
    match architecture(config):
        case "InternLM2ForCausalLM":
            return LlamaConfig(**common, attention_bias=values.get("bias", True))
        case "LlamaForCausalLM":
            return LlamaConfig(**common, attention_bias=values.get("attention_bias", False))
        case "Phi3ForCausalLM":
            window = values.get("sliding_window")
            if window is not None and window < common["max_position_embeddings"]:
                raise fields.error("sliding_window", f"{window}: attention within a window has no counterpart in Llama")
            return LlamaConfig(**common)
        case "Qwen2ForCausalLM":
            fields.one_of("use_sliding_window", (False,), False)
            return Qwen2Config(**common)
        case other:
            raise fields.error(
                "architectures",
                f"language tower {other!r} is not converted; known: InternLM2ForCausalLM, LlamaForCausalLM, Phi3ForCausalLM, "
                "Qwen2ForCausalLM",
            )


def _rope(fields: Fields) -> dict[str, Any]:
    values = fields.values
    theta = {"rope_theta": float(values.get("rope_theta", 10000.0))}
    match values.get("rope_scaling"):
        case None:
            return {"rope_type": "default", **theta}
        case {"type": "linear" | "dynamic" as rope_type, "factor": factor}:
            return {"rope_type": rope_type, "factor": float(factor), **theta}
        case {"type": "su" | "longrope", "short_factor": short, "long_factor": long}:
            trained = fields.required("original_max_position_embeddings")
            longrope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
            return {**longrope, "original_max_position_embeddings": trained, **theta}
        case other:
            rope_type = other.get("type") if isinstance(other, dict) else other
            raise fields.error(
                "rope_scaling", f"{rope_type!r} is not converted; known: linear, dynamic and su, with their factors"
            )
