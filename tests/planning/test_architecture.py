"""Counts from the configuration alone are those of the model that training loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig, Qwen2_5_VLConfig, Qwen3Config

from pipeline.config import BaseModelConfig, ConfigError, ExpertConfig
from pipeline.models.bases import Base, load_base
from pipeline.models.checkpoints import BaseError
from pipeline.models.target_modules import adapted_paths
from pipeline.planning.architecture import Architecture, architecture_of, base_configuration
from pipeline.training.lora import with_lora

BASES = Path(__file__).parents[2] / "jobs" / "configs" / "bases"
ORIGINALS = Path(__file__).parents[1] / "models" / "configs"


@pytest.fixture(scope="module")
def tiny() -> Architecture:
    return architecture_of(base_configuration(BaseModelConfig()))


def test_looking_changes_nothing(tiny_base: Base) -> None:
    """The configuration may be that of a loaded model, whose attention would be another one from then on."""
    text = tiny_base.model.config.get_text_config()
    before = text._attn_implementation
    architecture_of(tiny_base.model.config)
    assert text._attn_implementation == before == "sdpa"


def test_parts_are_those_of_the_loaded_model(tiny: Architecture) -> None:
    base = load_base(BaseModelConfig())
    inner = base.model.model
    assert tiny.parameters == {
        "vision tower": inner.vision_tower.num_parameters(),
        "projector": sum(p.numel() for p in inner.multi_modal_projector.parameters()),
        "language model": inner.language_model.num_parameters(),
        "head": 0,  # tied to the embeddings
    }
    assert tiny.total == base.model.num_parameters()
    assert tiny.tile_tokens == base.processor.image_seq_length
    assert [linear.path for linear in tiny.adapted] == adapted_paths(base.model, base.family, "auto")


def test_adapters_are_counted_as_peft_makes_them(tiny: Architecture) -> None:
    peft = with_lora(load_base(BaseModelConfig()), ExpertConfig(rank=8))
    assert tiny.adapter_parameters(8) == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    widths = [module.in_features for name, module in peft.named_modules() if name.endswith(".base_layer")]
    assert tiny.vector_parameters == sum(widths)


@pytest.mark.parametrize(
    ("name", "total", "adapter"),
    [("internvl2_2b", 2_205_754_368, 17_301_504), ("internvl2_8b", 8_075_365_376, 41_943_040)],
)
def test_internvl2_is_as_large_as_published(name: str, total: int, adapter: int) -> None:
    """Totals as the hub tells them of OpenGVLab's checkpoints: 2.21B and 8.08B."""
    architecture = architecture_of(base_configuration(BaseModelConfig(path=str(BASES / name))))
    assert architecture.total == total
    assert architecture.adapter_parameters(16) == adapter
    assert (architecture.tile_tokens, architecture.longest) == (256, 32_768)
    assert architecture.tower is not None
    assert architecture.tower.positions == 32 * 32 + 1


def test_the_published_configuration_is_converted_on_the_fly() -> None:
    converted, shipped = (
        architecture_of(base_configuration(BaseModelConfig(), folder / name))
        for folder, name in ((ORIGINALS, "internvl2_2b.json"), (BASES / "internvl2_2b", "config.json"))
    )
    assert converted == shipped


TWO: Any = {"num_hidden_layers": 2}
FAMILIES: dict[str, tuple[Any, dict[str, int]]] = {
    "llava": (
        LlavaConfig(text_config={"model_type": "llama", **TWO}),
        {"tile_tokens": 576, "positions": 577, "reads": 7},
    ),
    "qwen2_5_vl": (Qwen2_5_VLConfig(text_config=TWO), {"tile_tokens": 256, "positions": 1024, "reads": 7}),
    "qwen3": (Qwen3Config(**TWO), {"tile_tokens": 0, "positions": 0, "reads": 7}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_have_the_same_parts(name: str) -> None:
    config, expected = FAMILIES[name]
    architecture = architecture_of(config)
    assert architecture.decoder.layers == 2
    assert len(architecture.adapted) == 2 * expected["reads"]
    assert {linear.reads for linear in architecture.adapted} == {"attention", "heads", "mlp", "inner"}
    assert architecture.tile_tokens == expected["tile_tokens"]
    assert (architecture.tower.positions if architecture.tower else 0) == expected["positions"]
    assert (architecture.parameters["projector"] > 0) == (architecture.tower is not None)


def test_norms_of_queries_and_keys_count_for_all_heads() -> None:
    config = Qwen3Config(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert sorted(architecture_of(config).decoder.norm_widths) == [32, 64, 64, 64]


def test_targets_choose_linears(tiny: Architecture) -> None:
    configuration = base_configuration(BaseModelConfig())
    chosen = architecture_of(configuration, r".*\.layers\.[13]\..*\.(q_proj|down_proj)")
    assert [(linear.layer, linear.reads) for linear in chosen.adapted] == [
        (1, "attention"), (1, "inner"), (3, "attention"), (3, "inner")
    ]  # fmt: skip
    assert chosen.parameters == tiny.parameters
    with pytest.raises(ConfigError, match="matches the full path of no Linear"):
        architecture_of(configuration, "nothing")
    with pytest.raises(
        BaseError, match="vision_tower.encoder.layer.0.attention.q_proj, which training would adapt, but"
    ):
        architecture_of(configuration, r".*\.q_proj")


def test_mistakes_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    def error(path: str = "tiny", text: str | None = None) -> str:
        file = None
        if text is not None:
            file = tmp_path / "config.json"
            file.write_text(text)
        with pytest.raises(BaseError) as raised:
            base_configuration(BaseModelConfig(path=path), file)
        return str(raised.value)

    assert "--base-config path/to/config.json" in error("OpenGVLab/InternVL2-2B")
    assert "hf download OpenGVLab/InternVL2-2B config.json" in error("OpenGVLab/InternVL2-2B")
    assert "not valid JSON" in error(text="{")
    assert "model_type 'bert'" in error(text=json.dumps({"model_type": "bert"}))
    assert "model_type None" in error(text="[]")
    assert "llm_config: missing" in error(text=json.dumps({"model_type": "internvl_chat", "ps_version": "v2"}))
    with pytest.raises(BaseError, match=r"nowhere\.json: cannot be read"):
        base_configuration(BaseModelConfig(), tmp_path / "nowhere.json")
