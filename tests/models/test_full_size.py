"""InternVL2 at its full size, on the meta device: what is adapted, what is trained, how large experts and pools are.

Shapes: D width of the language model, K width of its keys, I width inside its MLP, L layers, V vocabulary, R rank.
"""

import json
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import InternVLForConditionalGeneration

from pipeline.models.families import family_of
from pipeline.models.internvl2.config import architecture, convert_config, read_config, tokens_per_tile
from pipeline.models.internvl2.names import conversion_plan
from pipeline.routing.features import feature_width
from pipeline.routing.layer_classifiers import WIDTH
from pipeline.routing.serialization import statistics_tensors
from pipeline.routing.statistics import PromptStatistics
from tests.models import original

RANK = 16
SIZES = {"2b": (2048, 1024, 8192, 24), "8b": (4096, 1024, 14336, 32)}
"""D, K, I, L by model."""


def original_config(size: str) -> dict[str, Any]:
    return json.loads((original.CONFIGS / f"internvl2_{size}.json").read_text())


def converted_config(size: str) -> Any:
    fields = read_config(original_config(size), original.CONFIGS / f"internvl2_{size}.json")
    return convert_config(fields, image_token_id=92546, tied=False)


def full_size(size: str) -> InternVLForConditionalGeneration:
    with torch.device("meta"):
        return InternVLForConditionalGeneration(converted_config(size))


@pytest.fixture(scope="module")
def models():
    return {size: full_size(size) for size in SIZES}


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the Linears that an expert adapts, by path."""
    targets = family_of(model.config).linears
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, path)}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        # What the files that were published hold: 0.94, 2.21, 8.08 and 25.51 thousand million.
        ("1b", 938_158_976),
        ("2b", 2_205_754_368),
        ("8b", 8_075_365_376),
        ("26b", 25_514_186_112),
    ],
)
def test_every_original_tensor_has_its_place(size, parameters):
    """All names and shapes of the original layout, against the plan of the conversion."""
    config = original_config(size)
    fields = read_config(config, original.CONFIGS / f"internvl2_{size}.json")
    moves = conversion_plan(convert_config(fields, image_token_id=92546, tied=False), architecture(fields))
    assert {move.source: move.shape for move in moves} == dict(original.shapes(config))
    assert sum(shape.numel() for move in moves for shape in move.shapes) == parameters
    assert tokens_per_tile(fields) == 256


@pytest.mark.parametrize("size", SIZES)
def test_seven_linears_a_layer_are_adapted_and_none_that_sees_images(models, size):
    layers = SIZES[size][3]
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {f"model.language_model.layers.{layer}.{name}" for layer in range(layers) for name in names}
    assert adapted(models[size]).keys() == expected
    assert len(expected) == 7 * layers
    others = [path for path, m in models[size].named_modules() if isinstance(m, nn.Linear) and path not in expected]
    # Vision tower: q, k, v, output and two of the MLP in 24 layers; projector: two; and the output layer.
    assert len(others) == 6 * 24 + 2 + 1


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_base_by_part(models, size):
    model = models[size]
    width, keys, inner, layers = SIZES[size]
    # InternViT-300M, 1024 wide: class token, 1 + 32 x 32 positions, patches of 14 x 14 x 3; 24 layers of 4 x 1024^2 in
    # attention, 2 x 1024 x 4096 in the MLP, biases, two LayerNorms and two layer scales.
    stem = 1024 + 1025 * 1024 + (3 * 14 * 14 * 1024 + 1024)
    layer = 4 * (1024 * 1024 + 1024) + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 4 * 1024 + 2 * 1024
    assert count(model.model.vision_tower) == stem + 24 * layer == 304_012_288
    # LayerNorm of 4 x 1024, 4096 -> D, D -> D, with biases.
    projector = 2 * 4096 + (4096 * width + width) + (width * width + width)
    assert count(model.model.multi_modal_projector) == projector == {"2b": 12_595_200, "8b": 33_570_816}[size]
    # Embedding and output layer V D each; a layer: 2 D^2 + 2 D K + 3 D I and two norms; the last norm.
    assert count(model.lm_head) == 92_553 * width
    layer = 2 * width * width + 2 * width * keys + 3 * width * inner + 2 * width
    assert count(model.model.language_model) == 92_553 * width + layers * layer + width
    total = {"2b": 2_205_754_368, "8b": 8_075_365_376}[size]
    assert count(model) == total
    # The Linears that are adapted: most of the base.
    share = sum(count(linear) for linear in adapted(model).values()) / total
    assert share == pytest.approx({"2b": 0.684, "8b": 0.864}[size], abs=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_an_experts_lora(size):
    """What PEFT makes trainable at rank 16: R (D + O) a Linear."""
    width, keys, inner, layers = SIZES[size]
    # A layer: q and o D + D each, k and v D + K each, gate, up and down D + I each: 9 D + 2 K + 3 I... times R.
    lora = layers * RANK * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inner))
    assert lora == {"2b": 17_301_504, "8b": 41_943_040}[size]
    model = full_size(size)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=family_of(model.config).linears)
    peft = get_peft_model(model, config, low_cpu_mem_usage=True)
    trainable = {name: p.numel() for name, p in peft.named_parameters() if p.requires_grad}
    assert sum(trainable.values()) == lora
    assert len(trainable) == 2 * 7 * layers
    assert all("language_model" in name for name in trainable)


def statistics_bytes(width: int) -> int:
    """Bytes of the statistics of prompts with `width` features: half the scatter in float32; the mean, count, pictures and
    threshold in eight bytes each."""
    return 4 * width * (width + 1) // 2 + 8 * width + 8 + 8 + 8


@pytest.mark.parametrize("width", [3, WIDTH])
def test_statistics_are_as_large_as_the_formula_says(width):
    tensors = statistics_tensors(PromptStatistics.of(torch.randn(4, width)))
    assert sum(tensor.nbytes for tensor in tensors.values()) == statistics_bytes(width)


@pytest.mark.parametrize("size", SIZES)
def test_an_expert_and_a_pool_of_a_hundred(models, size):
    width, _, inner, layers = SIZES[size]
    linears = adapted(models[size])
    # Routing vectors, float32: one as wide as the Linear's input; six of D and one of I a layer.
    vectors = 4 * sum(linear.in_features for linear in linears.values())
    assert vectors == 4 * layers * (6 * width + inner) == {"2b": 1_966_080, "8b": 4_980_736}[size]
    # Statistics of the prompts: 3 D features projected to 512; 0.53 MB whatever the base.
    features = statistics_bytes(feature_width(width, None))
    assert features == statistics_bytes(512) == 4 * 512 * 513 // 2 + 8 * 512 + 24 == 529_432
    # Evidence: 64 features at the four distinct inputs of a layer (q k v, o, gate up, down).
    per_expert = 4 * layers * statistics_bytes(WIDTH)
    assert per_expert == 4 * layers * (4 * 64 * 65 // 2 + 8 * 64 + 24) == {"2b": 850_176, "8b": 1_133_568}[size]
    # LoRA in bfloat16.
    lora = 2 * RANK * sum(linear.in_features + linear.out_features for linear in linears.values())
    assert lora == {"2b": 34_603_008, "8b": 83_886_080}[size]
    expert = lora + vectors + features + per_expert
    assert expert == {"2b": 37_948_696, "8b": 90_529_816}[size]
    assert (features + per_expert) / lora < {"2b": 0.04, "8b": 0.02}[size]
    # A hundred experts: 3.8 and 9.1 GB on disk, 0.86 and 0.56 of the base they share in bfloat16.
    base = 2 * count(models[size])
    assert 100 * expert / base == pytest.approx({"2b": 0.860, "8b": 0.561}[size], abs=1e-3)
