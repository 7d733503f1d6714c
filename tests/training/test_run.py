"""Real Ray Train runs under real DeepSpeed, on the untrained tiny base."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from ray.util.state import list_actors
from safetensors.torch import load_file

from cluster.local import connect
from cluster.preflight import build_deepspeed_ops
from pipeline.config import BaseModelConfig, DataConfig, ExpertConfig, RouterConfig, SourceConfig, TrainingConfig
from pipeline.models.bases import load_base
from pipeline.routing.expert import Expert
from pipeline.streams.preprocess import Part, prepare
from pipeline.streams.training_rows import TrainingRows
from pipeline.training import run
from pipeline.training.run import TrainingError, run_training
from pipeline.training.worker import Job

ROWS = 100
"""Not a multiple of the batch size: a step of each stage lies on the border of an epoch."""


@pytest.fixture(scope="module")
def worker_env() -> dict[str, str]:
    connect()
    return build_deepspeed_ops()


@pytest.fixture(scope="module")
def rows(worker_env, tiny_folder: Path, tmp_path_factory) -> TrainingRows:
    folder = tmp_path_factory.mktemp("rows")
    prepared = prepare(
        {"digits": Part(SourceConfig(path="embedded://digits/train", limit=ROWS))},
        DataConfig(),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=folder,
        quarantine=folder,
        answer=True,
    )
    return prepared.training_rows(["digits"])


def make_job(
    tiny_folder: Path, digest: str, *, training: TrainingConfig, learning_rate: float = 5e-3, steps: int = 12
) -> Job:
    return Job(
        task="digits",
        digest=digest,
        data_fingerprint="data",
        seed=3,
        base=BaseModelConfig(path=str(tiny_folder)),
        expert=ExpertConfig(rank=4, steps=steps, batch_size=16, learning_rate=learning_rate),
        router=RouterConfig(steps=7),
        training=training,
    )


ONE = TrainingConfig(threads=1, checkpoint_every=4)


@pytest.fixture(scope="module")
def trained(rows, tiny_folder, worker_env, tmp_path_factory):
    def counted(settings):
        from pipeline.training import worker

        loads, load = [], worker.load_base
        worker.load_base = lambda *args, **kwargs: loads.append(None) or load(*args, **kwargs)
        return worker.train(settings) | {"loads": len(loads)}

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", counted)
        result = run_training(
            make_job(tiny_folder, "one", training=ONE),
            rows,
            storage=tmp_path_factory.mktemp("storage"),
            on_steps=seen.extend,
            worker_env=worker_env,
        )
    return result, seen


def test_a_run_leaves_no_controller_and_no_handler_of_signals(trained):
    deadline = time.monotonic() + 10  # the cluster notes an actor's end a moment later
    alive = [("class_name", "=", "TrainController"), ("state", "=", "ALIVE")]
    while left := list_actors(address=connect().address, filters=alive):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_leaves_a_complete_expert(trained, tiny_folder):
    result, seen = trained
    expert = Expert.load(result.expert)
    assert result.figures["loads"] == 1, "one base for both stages"
    assert {step.stage for step in seen} == {"expert", "router"}
    assert [step.step for step in seen if step.stage == "expert"] == list(range(1, 13))
    assert result.figures["expert_losses"][-1] < result.figures["expert_losses"][0]
    assert expert.statistics.count == ROWS, "every prompt once"
    assert {statistics.count for statistics in expert.evidence.values()} == {ROWS}, "here too"
    assert all(vector.any() for vector in expert.vectors.values()), "every gate has moved"
    assert set(expert.vectors) == set(expert.adapters)
    assert not any("vision_tower" in path for path in expert.adapters)
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    assert expert.card.base_fingerprint == base.fingerprint
    PeftModel.from_pretrained(base.model, result.expert)


def test_checkpoints_hold_adapters_only(trained, tiny_folder):
    result, _ = trained
    base_bytes = sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    files = [f for f in result.checkpoint.parent.rglob("*") if f.is_file()]
    for file in files:
        if file.suffix == ".safetensors":
            assert not any("embed_tokens" in key or "base_layer" in key for key in load_file(file))
    assert sum(f.stat().st_size for f in files) < base_bytes


def test_a_finished_run_is_found_again(trained, rows, tiny_folder, worker_env):
    result, _ = trained
    storage = result.checkpoint.parent.parent
    again = run_training(make_job(tiny_folder, "one", training=ONE), rows, storage=storage, worker_env=worker_env)
    assert again.figures["expert_losses"] == result.figures["expert_losses"]
    assert_same_expert(Expert.load(again.expert), Expert.load(result.expert))


def test_a_killed_worker_comes_back_and_ends_with_the_same_expert(trained, rows, tiny_folder, worker_env, tmp_path):
    killed = []

    def kill_once(steps) -> None:
        if not killed and any(step.step >= 6 for step in steps):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # ended, or a zombie, since the list was made
                    if "RayTrainWorker" in " ".join(process.cmdline()[:1]):
                        process.kill()
                        killed.append(process.pid)

    job = make_job(tiny_folder, "killed", training=ONE.model_copy(update={"max_failures": 1}))
    result = run_training(job, rows, storage=tmp_path, on_steps=kill_once, worker_env=worker_env)
    assert killed
    assert_same_expert(Expert.load(result.expert), Expert.load(trained[0].expert))


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_zero_stages_and_workers(workers, stage, trained, rows, tiny_folder, worker_env, tmp_path):
    training = TrainingConfig(workers=workers, threads=1, zero_stage=stage, zero_persistence_threshold=0)
    job = make_job(tiny_folder, f"zero{stage}", training=training)
    result = run_training(job, rows, storage=tmp_path, worker_env=worker_env)
    expert = Expert.load(result.expert)
    expert.check_trained()
    assert expert.statistics.count == ROWS, "every prompt once"
    assert result.figures["expert_losses"][-1] == pytest.approx(trained[0].figures["expert_losses"][-1], abs=0.5)
    assert all(a.a_RD.shape[0] == 4 for a in expert.adapters.values()), "no empty shards of ZeRO-3"


def test_small_batches_accumulate_to_the_same_step(trained, rows, tiny_folder, worker_env, tmp_path):
    """Also without keeping activations, and with the optimizer's states in CPU memory: all change memory, not results."""
    saving = {"micro_batch": 4, "gradient_checkpointing": True, "offload": "optimizer"}
    job = make_job(tiny_folder, "saving", training=TrainingConfig(threads=1, **saving))
    job = job.model_copy(update={"router": RouterConfig(steps=4, statistics_rows=50)})
    result = run_training(job, rows, storage=tmp_path, worker_env=worker_env)
    expected, found = trained[0].figures, result.figures
    assert found["samples"] == expected["samples"] == 12 * 16
    assert len(found["expert_losses"]) == 12
    assert found["expert_losses"] == pytest.approx(expected["expert_losses"], rel=0.05)
    expert = Expert.load(result.expert)
    assert {statistics.count for statistics in [expert.statistics, *expert.evidence.values()]} == {50}


def test_experts_learn_from_features_as_from_pixels(trained, worker_env, tiny_folder, tmp_path):
    """The vision tower's answers are kept on disk; those who train do not load it."""
    part = Part(SourceConfig(path="embedded://digits/train", limit=ROWS), key="rows")
    settings = {
        "base": BaseModelConfig(path=str(tiny_folder)), "data_folder": tmp_path, "quarantine": tmp_path, "answer": True,
        "features": tmp_path / "features",
    }  # fmt: skip
    prepared = prepare({"digits": part}, DataConfig(vision_cache="features"), **settings)
    written = [file.stat().st_mtime_ns for file in (tmp_path / "features" / "digits-rows").glob("*.parquet")]
    job = make_job(tiny_folder, "features", training=ONE).model_copy(update={"vision": False})
    result = run_training(job, prepared.training_rows(["digits"]), storage=tmp_path, worker_env=worker_env)
    assert result.figures["expert_losses"] == pytest.approx(trained[0].figures["expert_losses"], rel=1e-3)
    again = prepare({"digits": part}, DataConfig(vision_cache="features"), **settings)
    assert again.counts == prepared.counts == {"digits": ROWS}
    files = (tmp_path / "features" / "digits-rows").glob("*.parquet")
    assert written == [file.stat().st_mtime_ns for file in files] != [], "computed once"


def test_rows_that_stream_are_learned_by_several_workers(trained, worker_env, tiny_folder, tmp_path):
    prepared = prepare(
        {"digits": Part(SourceConfig(path="embedded://digits/train", limit=ROWS))},
        DataConfig(cache="none"),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=tmp_path,
        quarantine=tmp_path,
        answer=True,
    )
    job = make_job(tiny_folder, "streamed", training=TrainingConfig(workers=2, threads=1, micro_batch=4))
    result = run_training(job, prepared.training_rows(["digits"]), storage=tmp_path, worker_env=worker_env)
    assert result.figures["samples"] == 12 * 16
    assert result.figures["expert_losses"][-1] == pytest.approx(trained[0].figures["expert_losses"][-1], abs=0.5)


def test_a_loss_that_is_not_finite_is_a_clear_error(rows, tiny_folder, worker_env, tmp_path):
    told = []
    job = make_job(tiny_folder, "wild", training=ONE, learning_rate=1e30)
    with pytest.raises(TrainingError, match="the loss is nan at step .*lower the learning rate") as failure:
        run_training(job, rows, storage=tmp_path, on_steps=told.extend, worker_env=worker_env)
    assert f"at step {len(told) + 1};" in str(failure.value), "every step before it has been told"


def test_an_expert_that_learned_nothing_is_refused(rows, tiny_folder, worker_env, tmp_path):
    job = make_job(tiny_folder, "idle", training=ONE, learning_rate=1e-60, steps=2)
    with pytest.raises(TrainingError, match="every LoRA B is zero"):
        run_training(job, rows, storage=tmp_path, worker_env=worker_env)


def assert_same_expert(one: Expert, other: Expert) -> None:
    for path, adapter in one.adapters.items():
        assert torch.equal(adapter.a_RD, other.adapters[path].a_RD)
        assert torch.equal(adapter.b_OR, other.adapters[path].b_OR)
        assert torch.equal(one.vectors[path], other.vectors[path])
    assert torch.equal(one.statistics.scatter_FF, other.statistics.scatter_FF)
    assert json.loads(one.card.model_dump_json())["samples"] == other.card.samples
