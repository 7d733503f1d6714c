"""Both stages on DeepSpeed's engines in a gloo group of their own, without Ray: what ranks and engines must agree on."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from jobs.benchmark.real_size import loss as benchmark
from jobs.benchmark.real_size.loss import OneStep
from jobs.benchmark.real_size.ranks import run_ranks
from pipeline.config import BaseModelConfig, ExpertConfig, TrainingConfig
from pipeline.memory import free_memory
from pipeline.models.bases import Base, load_base
from pipeline.models.encoding import Encoded, collate_for
from pipeline.models.target_modules import observed_paths
from pipeline.routing.adapters import load_adapters
from pipeline.routing.features import source_width
from pipeline.training.gates import with_gates
from pipeline.training.lockstep import VisionLockstep
from pipeline.training.loop import StageClock, run_steps
from pipeline.training.lora import save_lora, with_lora
from pipeline.training.loss import answer_loss, without_dropout
from pipeline.training.randomness import seed_all
from pipeline.training.statistics_collector import LayerInputCollector, collect_features
from pipeline.training.training_folder import load_state, save_state
from pipeline.training.zero import (
    base_dtype,
    close_engine,
    gathered,
    sharded_loading,
    start_engine,
    zero_config,
)
from tests.helpers import ask, features_of

pytestmark = pytest.mark.ray

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_micro_batches_and_workers_do_not_change_the_gradient() -> None:
    assert benchmark.measure()["gradient_difference"] <= 1e-5


def rows_of(base: Base, *, images: bool) -> list[Encoded]:
    images = [PICTURE] if images else []
    return [ask(base.processor, f"repeat : {word}", *images, answer=word) for word in ("red", "blue")]


def steps(engine: Any, batches: Sequence[dict[str, Any]], count: int, **kwargs: Any) -> list[float]:
    clock = StageClock()
    run_steps(
        engine,
        OneStep(batches),
        range(count),
        divergence_factor=1e9,
        clock=clock,
        on_step=lambda step, loss: None,
        **kwargs,
    )
    return clock.losses


def living(base: Base) -> tuple[int, int]:
    """Returns how many input embeddings of such a base, and how many engines, are in memory."""
    shape = (base.model.config.get_text_config().vocab_size, base.width)
    objects = gc.get_objects()
    parameters = [o for o in objects if isinstance(o, nn.Parameter)]
    bases = sum(tuple(getattr(p, "ds_shape", p.shape)) == shape for p in parameters)
    return bases, sum(type(o).__name__ == "DeepSpeedEngine" for o in objects)


def both_stages(path: str, folder: Path, training: TrainingConfig, dtype: str) -> dict[str, Any]:
    """Trains on rank 0's rows with and without images and on the others' without; on one base."""
    rank = dist.get_rank()
    settings = zero_config(training, micro_batch=2, accumulated=2, max_grad_norm=1.0)
    precision = torch.bfloat16 if training.precision == "bf16" else torch.float32
    actual: dict[str, Any] = {}
    with sharded_loading(settings):
        base = load_base(base_dtype(BaseModelConfig(path=path, dtype=dtype), training))
        if training.zero_stage == 3:
            VisionLockstep(base, "cpu")
        mixed = [rows_of(base, images=rank == 0), rows_of(base, images=False)]
        batches = [collate_for(base.processor, rows) for rows in mixed]

        def expert_stage() -> weakref.ref[Any]:
            torch.manual_seed(0)
            peft: Any = with_lora(base, ExpertConfig(rank=4), dtype=precision)
            engine = start_engine(peft, settings, learning_rate=5e-3, weight_decay=0.0, schedule=lambda step: 1.0)
            engine.train()
            actual["expert"] = steps(engine, batches, 4)
            actual["buffers"] = {buffer.dtype for _, buffer in base.model.named_buffers()}
            save_lora(peft, folder, write=rank == 0)
            close_engine(engine)
            peft.unload()
            return weakref.ref(engine.optimizer)

        optimizer = expert_stage()
        free_memory()
        dist.barrier()
        actual["freed"] = optimizer() is None
        actual["living"] = living(base)
        observed = observed_paths(base, "auto")
        gates = with_gates(base.model, load_adapters(folder)[1], dtype=precision)
        engine = start_engine(base.model, settings, learning_rate=5e-3, weight_decay=0.0, schedule=lambda step: 1.0)
        without_dropout(engine)
        own = [mixed[0], mixed[1] if rank == 0 else None]
        actual["features"], actual["ids"] = collect_features(
            engine, base, own, width=source_width(base.width), device="cpu"
        )
        layer_inputs = LayerInputCollector(base.model, observed)
        actual["router"] = steps(engine, batches, 3, before=lambda i, batch: layer_inputs.expect(batch, 2))
        actual["samples"] = {len(samples) for samples in layer_inputs.collect().values()}
        actual["whole"] = sum(parameter.numel() > 0 for parameter in base.model.parameters())
        with gathered([gate.vector for gate in gates.values()]):
            actual["moved"] = all(bool(gate.vector.any()) for gate in gates.values())
    return actual


@pytest.mark.parametrize(
    ("workers", "training", "dtype"),
    [
        (2, TrainingConfig(zero_stage=3, zero_persistence_threshold=0), "float32"),
        (2, TrainingConfig(zero_stage=3, zero_persistence_threshold=0, precision="bf16"), "bfloat16"),
        (2, TrainingConfig(precision="bf16"), "float32"),
        (1, TrainingConfig(), "bfloat16"),
    ],
    ids=["sharded", "sharded-bf16", "bf16-on-fp32", "fp32-on-bf16"],
)
def test_both_stages_train_on_one_base(workers, training, dtype, tiny_folder, tiny_base, tmp_path) -> None:
    actual = run_ranks(both_stages, workers, str(tiny_folder), tmp_path, training, dtype)
    for rank in actual:
        assert rank["expert"] == actual[0]["expert"], "all know the step's loss"
        assert rank["expert"][-1] < rank["expert"][0]
        assert rank["router"][-1] < rank["router"][0]
        assert rank["moved"]
        assert rank["buffers"] == {torch.float32}, "rotary frequencies are exact"
        assert rank["samples"] == {3 * 4 * workers}
        assert torch.equal(rank["features"], actual[0]["features"])
        assert rank["living"] == (1, 0), "one base, and no engine is left"
        assert rank["freed"], "nor its optimizer"
        if training.zero_stage == 3:
            assert rank["whole"] == 0, "everything is sharded"
    prompts = [rows_of(tiny_base, images=True), rows_of(tiny_base, images=False)] + [
        rows_of(tiny_base, images=False)
    ] * (workers - 1)
    expected = torch.cat([prompt_features(tiny_base, rows) for rows in prompts])
    exact = training.precision == "fp32" and dtype == "float32"
    torch.testing.assert_close(actual[0]["features"], expected, **({} if exact else {"rtol": 0.05, "atol": 0.05}))


def prompt_features(base: Base, rows: list[Encoded]) -> Tensor:
    """Returns features of the prompts alone, from a whole forward pass."""
    batch = collate_for(base.processor, rows)
    mask = batch["attention_mask"].bool() & (batch["labels"] < 0)
    return features_of(base, rows, side="right", prompt_mask=mask)


def interrupted(path: str, folder: Path, training: TrainingConfig, restart: bool) -> Tensor:
    """Trains five steps with dropout; with `restart`, a new engine goes on after the second."""
    with trained_engines(path, training, dropout=0.3) as (engine_of_its_own, batch):
        engine = engine_of_its_own()
        steps(engine, [batch], 2)
        if restart:
            save_state(engine, folder)
            dist.barrier()
            close_engine(engine)
            engine.module.unload()
            engine = engine_of_its_own()
            load_state(engine, folder, 2, ranks=dist.get_world_size())
        steps(engine, [batch], 3)
        return trained_weights(engine)


@contextmanager
def trained_engines(path: str, training: TrainingConfig, *, dropout: float = 0.0) -> Iterator[Any]:
    """Yields a function that starts an engine of the expert stage, always the same, and a batch of two rows."""
    settings = zero_config(training, micro_batch=2, accumulated=1, max_grad_norm=1.0)
    with sharded_loading(settings):
        base = load_base(base_dtype(BaseModelConfig(path=path), training))
        batch = collate_for(base.processor, rows_of(base, images=False))

        def engine_of_its_own() -> Any:
            seed_all(0)
            peft = with_lora(base, ExpertConfig(rank=4, dropout=dropout))
            engine = start_engine(
                peft, settings, learning_rate=5e-3, weight_decay=0.1, schedule=lambda step: 1 / (1 + step)
            )
            seed_all(0, 1, dist.get_rank())
            engine.train()
            return engine

        yield engine_of_its_own, batch


def trained_weights(engine: Any) -> Tensor:
    """Returns the trained weights (N,)."""
    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    with gathered(trained):
        return torch.cat([parameter.detach().flatten().clone() for parameter in trained])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_bit_for_bit_with_dropout(stage, tiny_folder, tmp_path) -> None:
    training = TrainingConfig(zero_stage=stage, zero_persistence_threshold=0)
    reference, restarted = (
        run_ranks(interrupted, 2, str(tiny_folder), tmp_path, training, restart) for restart in (False, True)
    )
    assert torch.equal(reference[0], reference[1])
    assert torch.equal(reference[0], restarted[0])


def one_step_each(path: str, folder: Path, stages: Sequence[int], begin: int, before: int) -> dict[str, Tensor]:
    """Trains one step at each of `stages` of ZeRO, always on the same rows, after those `begin` of `before` ranks.

    Each goes on with the state that the one before has kept. Returns the weights, by precision.
    """
    actual = {}
    for precision in ("fp32", "bf16"):
        (folder / precision).mkdir(exist_ok=True)
        for step, stage in enumerate(stages, begin):
            training = TrainingConfig.model_validate(
                {"precision": precision, "zero_stage": stage, "zero_persistence_threshold": 0}
            )
            with trained_engines(path, training) as (engine_of_its_own, batch):
                engine = engine_of_its_own()
                if step:
                    load_state(
                        engine, folder / precision, step, ranks=dist.get_world_size() if step > begin else before
                    )
                    dist.barrier()
                steps(engine, [batch], 1)
                save_state(engine, folder / precision)
                dist.barrier()
                actual[precision] = trained_weights(engine)
                close_engine(engine)
    return actual


def test_training_goes_on_with_other_ranks_and_zero_stages(tiny_folder, tmp_path) -> None:
    """Steps by so many ranks at some stage of ZeRO, one after the other, are steps of one rank that never stopped."""
    before, begin, parts = 0, 0, tmp_path / "parts"
    parts.mkdir()
    for ranks, stages in ((2, (2, 3)), (1, (0, 1)), (3, (3, 1, 0))):
        actual = run_ranks(one_step_each, ranks, str(tiny_folder), parts, stages, begin, before)[0]
        before, begin = ranks, begin + len(stages)
    reference = run_ranks(all_steps, 1, str(tiny_folder), begin)[0]
    torch.testing.assert_close(actual["fp32"], reference["fp32"], atol=1e-6, rtol=1e-4)
    # Gradients of different ranks are added up in bfloat16: single values near zero may take another turn.
    assert (actual["bf16"] - reference["bf16"]).norm() < 0.01 * reference["bf16"].norm()


def all_steps(path: str, count: int) -> dict[str, Tensor]:
    """Trains the same steps without stopping; returns the weights, by precision."""
    actual = {}
    for precision in ("fp32", "bf16"):
        with trained_engines(path, TrainingConfig(precision=precision)) as (engine_of_its_own, batch):
            engine = engine_of_its_own()
            steps(engine, [batch], count)
            actual[precision] = trained_weights(engine)
            close_engine(engine)
    return actual


def trained_logits(path: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Returns the logits of a long row in the bf16 engine that trained, and by the saved expert on a base as served."""
    training = TrainingConfig(precision="bf16")
    settings = zero_config(training, micro_batch=1, accumulated=1, max_grad_norm=1.0)
    base = load_base(base_dtype(BaseModelConfig(path=path), training))
    torch.manual_seed(0)
    peft = with_lora(base, ExpertConfig(rank=4), dtype=torch.bfloat16)
    engine = start_engine(peft, settings, learning_rate=5e-3, weight_decay=0.0, schedule=lambda step: 1.0)
    row = ask(base.processor, "repeat : " + "red blue " * 400, answer="red blue " * 20)
    batch = collate_for(base.processor, [row])
    steps(engine, [batch], 1)
    save_lora(peft, folder, write=True)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    engine.eval()
    with torch.no_grad():
        actual = engine(**inputs, use_cache=False).logits.float()
    served = load_base(BaseModelConfig(path=path))
    for name, adapter in load_adapters(folder)[1].items():
        linear = served.model.get_submodule(name)
        linear.weight.data += adapter.scaling * adapter.b_OR.float() @ adapter.a_RD.float()
    with torch.no_grad():
        return actual, served.model(**inputs, use_cache=False).logits


def test_an_expert_trained_in_bf16_is_served_as_it_was_trained(tiny_folder, tmp_path) -> None:
    ((actual, served),) = run_ranks(trained_logits, 1, str(tiny_folder), tmp_path)
    assert float((actual - served).norm() / served.norm()) < 0.03


def test_a_batch_without_answers_has_no_loss(tiny_base) -> None:
    batch = collate_for(tiny_base.processor, rows_of(tiny_base, images=False))
    batch["labels"].fill_(-100)
    assert answer_loss(tiny_base.model, batch, reduction="sum").item() == 0
