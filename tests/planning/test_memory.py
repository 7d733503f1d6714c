"""The memory model: against measured runs, against DeepSpeed's own defaults, and what each setting must change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs.benchmark.memory_estimate import PEAK, QUICK, Case, build, measure, measured_parts
from pipeline.config import TrainingConfig
from pipeline.planning.activations import Pass, activations, layer_bytes
from pipeline.planning.architecture import Architecture, architecture_of
from pipeline.planning.compute import operations, vision_operations
from pipeline.planning.states import DEFAULTS, States, states
from pipeline.routing.adapters import load_adapters
from pipeline.training.gates import with_gates
from pipeline.training.lora import save_lora
from pipeline.training.loss import answer_loss, without_dropout

CASE = Case("test", tiles=2)
STEP = Pass(rows=2, tokens=256, answer_tokens=16, tiles=4, rank=8, kernel="flash")
READERS = {"attention": 3, "heads": 1, "mlp": 2, "inner": 1}


@pytest.fixture(scope="module")
def small() -> Architecture:
    return architecture_of(CASE.configuration())


def test_planned_memory_is_what_training_takes() -> None:
    comparisons = measure(QUICK)
    assert {c.case for c in comparisons} == {case.name for case in QUICK}
    for comparison in comparisons:
        assert comparison.error <= 0.15, comparison
    assert max(c.error for c in comparisons if c.part == PEAK) <= 0.15


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"rows": 4, "padded": True}])
def test_the_router_stage_fits_where_the_expert_stage_does(changes: dict[str, Any], tmp_path: Path) -> None:
    """So one plan serves both: gates keep the inputs that a LoRA keeps, and there are fewer gradients and moments."""
    model, batch = build(replace(CASE, **changes))
    expert = measured_parts(model, batch)[PEAK]
    save_lora(model, tmp_path, write=True)
    model = model.unload()
    gates = with_gates(model, load_adapters(tmp_path)[1])
    without_dropout(model)
    frozen = sum(gate.a_RD.nbytes + gate.b_OR.nbytes for gate in gates.values())
    assert measured_parts(model, batch)[PEAK] + frozen < expert


def test_checkpointing_keeps_inputs_and_makes_one_layer_again(small: Architecture) -> None:
    plain, again = (activations(small, replace(STEP, checkpointing=on)) for on in (False, True))
    assert again.kept < plain.kept / 5
    layer = layer_bytes(small.decoder, STEP, READERS)
    assert (again.recomputed, plain.recomputed) == (layer, 0)
    rotary = 2 * 2 * 256 * 32
    assert again.kept_first == STEP.total * 2 * 128 + rotary  # the first layer's input
    assert plain.kept_first == layer - STEP.total * (4 * 128 + 4) + rotary  # without its first norm
    assert again.logits == plain.logits


def test_logits_are_computed_where_answers_are(small: Architecture) -> None:
    few, many = (activations(small, replace(STEP, answer_tokens=tokens)) for tokens in (16, 160))
    assert (few.logits, many.logits) == (12 * 2 * 16 * 2000, 12 * 2 * 160 * 2000)
    assert replace(few, logits=0) == replace(many, logits=0)


def test_attention_kernels_keep_what_they_are_said_to(small: Architecture) -> None:
    kept = {kernel: activations(small, replace(STEP, kernel=kernel)).kept for kernel in ("flash", "masked", "eager")}
    n, layers, heads = STEP.total, 4, 4
    # Keys and values of half the width are repeated, and a mask of T numbers a token; matrices of all heads in 4 + 2 bytes.
    assert kept["masked"] - kept["flash"] == layers * 2 * n * (128 + STEP.tokens)
    eager = layers * n * (STEP.tokens * heads * (4 + 2) + 2 * (3 * 128 - 2 * 128 - 2 * 64 + 128) - 4 * heads)
    assert kept["eager"] - kept["flash"] == eager


def test_dropout_keeps_inputs_and_masks_by_device(small: Architecture) -> None:
    widths = 3 * 128 + 128 + 2 * 128 + 352
    without = layer_bytes(small.decoder, STEP, READERS)
    shared = STEP.total * 2 * (128 + 128 + 352)
    for gpu, mask in ((True, 1), (False, 2)):
        extra = layer_bytes(small.decoder, replace(STEP, dropout=True, gpu=gpu), READERS) - without
        assert extra == STEP.total * widths * (2 + mask) - shared


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_below_the_first_adapter(small: Architecture, checkpointing: bool) -> None:
    step = replace(STEP, checkpointing=checkpointing)
    top = architecture_of(CASE.configuration(), r".*\.layers\.3\..*_proj")
    top_only, every = activations(top, step), activations(small, step)
    assert top_only.kept_last == top_only.kept_first == every.kept_first


def test_cached_features_need_no_vision_tower(small: Architecture) -> None:
    with_tower, without = (activations(small, replace(STEP, tiles=tiles)) for tiles in (4, 0))
    assert with_tower.vision > 0
    assert without.vision == 0
    assert without.kept == with_tower.kept


def settle(stage: int, workers: int = 4, offload: str = "none", precision: str = "bf16", **zero: int) -> States:
    training = TrainingConfig(zero_stage=stage, workers=workers, offload=offload, precision=precision)
    size = 2 if precision == "bf16" else 4
    return states(base=4000, adapter=400, training=training, weight_bytes=size, adapter_bytes=size, zero=zero)


def test_zero_shards_what_its_stage_says() -> None:
    table = {stage: settle(stage, reduce_bucket_size=10, stage3_max_live_parameters=50) for stage in range(4)}
    assert {stage: s.weights for stage, s in table.items()} == {0: 8000, 1: 8000, 2: 8000, 3: 2000}
    assert {stage: s.gathered for stage, s in table.items()} == {0: 0, 1: 0, 2: 0, 3: 100}
    assert {stage: s.gradients for stage, s in table.items()} == {0: 800, 1: 800, 2: 200, 3: 200}
    assert {stage: s.optimizer for stage, s in table.items()} == {0: 4800, 1: 1200, 2: 1200, 3: 1200}
    assert {stage: s.bucket for stage, s in table.items()} == {0: 0, 1: 20, 2: 20, 3: 20}
    assert settle(0, precision="fp32").optimizer == 8 * 400  # the weights are in float32 themselves


def test_offload_moves_to_the_cpu() -> None:
    some, everything = settle(2, offload="optimizer"), settle(3, offload="all")
    assert some.optimizer == everything.optimizer == everything.weights == 0
    assert some.weights == 8000
    assert some.cpu == {"optimizer states": 1200 + 400}
    assert everything.cpu == {"optimizer states": 1600, "frozen weights": 2000}


def test_buffers_are_deepspeeds_own_defaults() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = DeepSpeedZeroConfig()
    defaults = {
        "reduce_bucket_size": config.reduce_bucket_size,
        "stage3_max_live_parameters": config.max_live_parameters,
    }
    assert defaults == DEFAULTS
    assert config.contiguous_gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_pytorch_counts(checkpointing: bool) -> None:
    """PyTorch's counter sees matrix products, those of eager attention too, and the patch embedding."""
    case = replace(CASE, attention="eager", checkpointing=checkpointing, tokens=128)
    model, batch = build(case)
    architecture = architecture_of(case.configuration())
    with FlopCounterMode(display=False) as seen:
        answer_loss(model, batch).backward()
    expected = operations(
        architecture,
        tokens=case.tokens,
        answer_tokens=case.answer,
        tiles=case.tiles,
        rank=case.rank,
        kernel="eager",
        checkpointing=checkpointing,
    )
    assert case.rows * expected.total == pytest.approx(seen.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as seen, torch.no_grad():
        model.get_base_model().model.get_image_features(
            batch["pixel_values"], vision_feature_layer=-1, return_dict=True
        )
    assert vision_operations(architecture, case.rows * case.tiles) == pytest.approx(seen.get_total_flops(), rel=0.02)


def test_a_frozen_base_takes_two_thirds(small: Architecture) -> None:
    row = operations(small, tokens=512, answer_tokens=512, tiles=0, rank=1, kernel="eager", checkpointing=False)
    assert row.backward == row.forward + 4 * 512**2 * 128 * 4
    assert row.vision == 0
