"""Real Ray Train runs under real DeepSpeed, on the untrained tiny base."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from ray.util.state import list_actors
from safetensors.torch import load_file

from cluster.deepspeed_ops import build_deepspeed_ops
from cluster.local import connect
from pipeline.config import BaseModelConfig, DataConfig, RouterConfig, SourceConfig, TrainingConfig
from pipeline.data.loading.preprocess import TaskRows, prepare
from pipeline.data.loading.training_rows import CachedRows, TrainingRows
from pipeline.models.bases import load_base
from pipeline.models.encoding import collate_for
from pipeline.routing.expert import Expert
from pipeline.training import session as sessions
from pipeline.training.elastic_weights import read_fisher
from pipeline.training.loss import answer_loss
from pipeline.training.session import TrainingError, TrainingGivenUp, run_training, training_session
from pipeline.training.training_folder import TrainingFolder
from tests.training.trainings import ONE, ROWS, assert_same_expert, kill, make_spec

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def worker_env() -> dict[str, str]:
    connect()
    return build_deepspeed_ops()


@pytest.fixture(scope="module")
def rows(worker_env, tiny_folder: Path, tmp_path_factory) -> TrainingRows:
    folder = tmp_path_factory.mktemp("rows")
    prepared = prepare(
        {"digits": TaskRows(SourceConfig(path="demo://digits/train", limit=ROWS))},
        DataConfig(),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=folder,
        quarantine=folder,
        answer=True,
    )
    return prepared.training_rows(["digits"])


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """File in which a session's workers write down each time they load a base."""
    return tmp_path_factory.mktemp("loads") / "loads"


@pytest.fixture(scope="module")
def session(worker_env, loads, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")

    def counted(settings):
        from pipeline.training import held_base, worker

        load = held_base.load_base

        def noted(*args, **kwargs):
            with loads.open("a") as file:
                file.write("a base\n")
            return load(*args, **kwargs)

        held_base.load_base = noted
        worker.train(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "train", counted)
        with training_session(ONE, storage=storage, worker_env=worker_env) as opened:
            yield opened


@pytest.fixture(scope="module")
def trained(session, loads, rows, tiny_folder):
    seen, spec = [], make_spec(tiny_folder, "one", training=ONE)
    session.start(spec)
    until = time.monotonic() + 180
    while not loads.is_file():
        assert time.monotonic() < until, "the base is loaded before there is a training"
        time.sleep(0.2)
    result = session.train(spec, rows, seen.extend)
    return result, seen


def test_a_run_leaves_a_complete_expert(trained, tiny_folder):
    result, seen = trained
    expert = Expert.load(result.expert)
    assert {step.stage for step in seen} == {"expert", "router"}
    assert [step.step for step in seen if step.stage == "expert"] == list(range(1, 13))
    assert result.metrics["expert_losses"][-1] < result.metrics["expert_losses"][0]
    assert expert.statistics.count == ROWS, "every prompt once"
    assert {statistics.count for statistics in expert.layer_statistics.values()} == {ROWS}, "here too"
    assert all(vector.any() for vector in expert.vectors.values()), "every gate has moved"
    assert set(expert.vectors) == set(expert.adapters)
    assert not any("vision_tower" in path for path in expert.adapters)
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    assert expert.card.base_fingerprint == base.fingerprint
    PeftModel.from_pretrained(base.model, result.expert)


def test_the_next_job_finds_the_workers_warm_and_the_base_as_it_was(trained, session, loads, rows, tiny_folder):
    """A failed job between them, and one without router stage, leave nothing behind either."""
    messages = []
    again = session.train(make_spec(tiny_folder, "again", training=ONE), rows, messages.extend)
    assert_same_expert(Expert.load(again.expert), Expert.load(trained[0].expert))
    assert [step.step for step in messages if step.stage == "expert"] == list(range(1, 13)), "no step of the job before"
    assert loads.read_text() == "a base\n", "one base for both stages of both jobs"
    alone = make_spec(tiny_folder, "alone", training=ONE, steps=2).model_copy(update={"router_stage": False})
    assert load_file(session.train(alone, rows).adapter / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match="the loss is nan at step .*lower the learning rate"):
        session.train(make_spec(tiny_folder, "wild", training=ONE, learning_rate=1e30), rows)
    third = session.train(make_spec(tiny_folder, "third", training=ONE), rows)
    assert_same_expert(Expert.load(third.expert), Expert.load(trained[0].expert))


def test_workers_do_not_train_what_is_finished_but_not_reported(trained, session, rows, tiny_folder, monkeypatch):
    """Those that came before them may have died between the last step and telling of it."""
    before, _ = trained
    written = (before.expert / "expert.json").stat().st_mtime_ns
    monkeypatch.setattr(TrainingFolder, "metrics", lambda self: None)  # in the driver alone
    seen = []
    again = session.train(make_spec(tiny_folder, "one", training=ONE), rows, seen.extend)
    assert again.metrics == before.metrics
    assert (before.already_finished, again.already_finished) == (False, True)
    assert seen == []
    assert (again.expert / "expert.json").stat().st_mtime_ns == written


def test_the_best_adapter_on_held_out_rows_becomes_the_expert(trained, session, rows, tiny_folder):
    """With steps far too long the first look is the best, and training stops after two that are worse."""
    messages = []
    spec = make_spec(tiny_folder, "held-out", training=ONE, learning_rate=3.0, steps=40)
    expert = spec.expert.model_copy(update={"validate_every": 2, "patience": 2, "warmup_ratio": 0.0})
    result = session.train(spec.model_copy(update={"validation": 0.2, "expert": expert}), rows, messages.extend)
    looks = result.metrics["validation_losses"]
    best = min(looks, key=lambda look: look[1])
    stopped = len(result.metrics["expert_losses"])
    assert stopped == best[0] + 4 < 40
    assert result.metrics["samples"] == stopped * 16
    assert [step.step for step in messages if step.stage == "validation"] == [step for step, _ in looks]
    actual = Expert.load(result.expert)
    assert actual.statistics.count == ROWS - 20, "of the rows that were learned"
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    learned, held = rows.split(0.2, spec.seed)
    peft = PeftModel.from_pretrained(base.model, result.expert)
    with torch.no_grad():
        batch = collate_for(base.processor, list(CachedRows(held)))
        assert answer_loss(peft, batch).item() == pytest.approx(best[1], rel=1e-4)
        next_BT = batch["labels"][:, 1:]
        likeliest_BT = peft(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].argmax(-1)
    right_B = ((likeliest_BT == next_BT) | (next_BT == -100)).all(1)
    accuracies = dict(result.metrics["validation_accuracies"])
    assert accuracies[best[0]] == pytest.approx(right_B.double().mean().item())
    assert actual.card.metrics["validation_accuracy"] == accuracies[best[0]]
    assert [step.accuracy for step in messages if step.stage == "validation"] == list(accuracies.values())
    assert not list(result.folder.parent.glob("best-*"))
    assert learned.count + held.count == ROWS


def test_weights_are_held_where_the_task_before_needs_them(session, rows, tiny_folder):
    """Elastic weight consolidation: what the task before weighs by its Fisher information moves less."""

    def train(digest: str, elasticity: float, start: Path | None = None) -> Path:
        spec = make_spec(tiny_folder, digest, training=ONE, steps=8)
        changes = {"router_stage": False, "elasticity": elasticity, "start": None if start is None else str(start)}
        return session.train(spec.model_copy(update=changes), rows).adapter

    first = train("elastic-first", 0.0)
    held, free = (train(f"elastic-{strength}", strength, first) for strength in (1e3, 0.0))
    before, after = read_fisher(first), read_fisher(free)
    assert all((after[name] >= value).all() for name, value in before.items()), "that of both tasks"
    assert any((after[name] > value).any() for name, value in before.items())

    def moved(adapter: Path) -> float:
        weights, anchor = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, first))
        of = {name.replace(".default", ""): value for name, value in before.items()}
        return sum(float((of[name] * (weights[name] - anchor[name]).square()).sum()) for name in anchor)

    assert 0 < moved(held) < 0.7 * moved(free)


def test_a_training_that_nobody_wants_ends_at_a_validation_and_can_go_on(trained, session, loads, rows, tiny_folder):
    spec, seen = make_spec(tiny_folder, "given-up", training=ONE, steps=80), []
    expert = spec.expert.model_copy(update={"validate_every": 5})
    spec = spec.model_copy(update={"validation": 0.2, "expert": expert})
    before = loads.read_text()
    with pytest.raises(TrainingGivenUp):
        session.train(spec, rows, seen.extend, every=0.05, is_wanted=lambda: not seen)
    assert not session.train(spec, rows).already_finished
    assert loads.read_text() == before, "the base stayed as it was"
    whole = session.train(spec.model_copy(update={"digest": "whole"}), rows)
    again = session.train(spec, rows)
    assert again.metrics["validation_losses"] == whole.metrics["validation_losses"]
    assert_same_expert(Expert.load(again.expert), Expert.load(whole.expert))


def test_a_finished_job_is_found_again(trained, rows, tiny_folder, worker_env):
    result, _ = trained
    storage = result.folder.parents[1]
    again = run_training(make_spec(tiny_folder, "one", training=ONE), rows, storage=storage, worker_env=worker_env)
    assert again.metrics["expert_losses"] == result.metrics["expert_losses"]
    assert_same_expert(Expert.load(again.expert), Expert.load(result.expert))


def test_a_closed_session_leaves_no_process_and_no_handler_of_signals(rows, tiny_folder, worker_env, tmp_path):
    before = {actor.actor_id for actor in _alive()}
    spec = make_spec(tiny_folder, "short", training=ONE, steps=2)
    run_training(spec, rows, storage=tmp_path, worker_env=worker_env)
    deadline = time.monotonic() + 10  # the cluster notes an actor's end a moment later
    while left := [actor.class_name for actor in _alive() if actor.actor_id not in before]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_is_interrupted_stops_its_workers(rows, tiny_folder, worker_env, tmp_path):
    spec, before = make_spec(tiny_folder, "long", training=ONE, steps=100_000), set(threading.enumerate())
    with training_session(ONE, storage=tmp_path, worker_env=worker_env) as session:
        with pytest.raises(KeyboardInterrupt):
            session.train(spec, rows, lambda steps: signal.raise_signal(signal.SIGINT))
        session.close(at_once=True)
        assert not [t for t in set(threading.enumerate()) - before if t.name == "training session"]


def _alive() -> list:
    alive = list_actors(address=connect().address, filters=[("state", "=", "ALIVE")], limit=1000)
    return [actor for actor in alive if actor.class_name in {"TrainController", "TrainingQueue", "RayTrainWorker"}]


def test_a_killed_worker_comes_back_and_ends_with_the_same_expert(trained, rows, tiny_folder, worker_env, tmp_path):
    killed, kept, seen = [], [], []

    def kill_once(steps) -> None:
        seen.extend(step.remark for step in steps if step.remark)
        if not killed and any(step.step >= 6 for step in steps):
            kept.extend((file, file.stat().st_size) for file in (tmp_path / "digits-killed").rglob("*.*"))
            kill(killed)

    spec = make_spec(tiny_folder, "killed", training=ONE.model_copy(update={"max_failures": 1}))
    result = run_training(spec, rows, storage=tmp_path, on_steps=kill_once, worker_env=worker_env)
    assert killed
    (told,) = seen
    assert told.startswith("digits: the worker of rank 0 died (killed, or out of memory)")
    assert told.endswith("; restart 1 of 1, from the last checkpoint")
    base_bytes = sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    assert 0 < sum(size for _, size in kept) < base_bytes, "checkpoints hold adapters only"
    assert_same_expert(Expert.load(result.expert), Expert.load(trained[0].expert))


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_zero_stages_and_workers(workers, stage, trained, rows, tiny_folder, worker_env, tmp_path):
    training = TrainingConfig(workers=workers, cpus_per_worker=1, zero_stage=stage, zero_persistence_threshold=0)
    spec = make_spec(tiny_folder, f"zero{stage}", training=training)
    result = run_training(spec, rows, storage=tmp_path, worker_env=worker_env)
    expert = Expert.load(result.expert)
    expert.check_trained()
    assert expert.statistics.count == ROWS, "every prompt once"
    assert result.metrics["expert_losses"][-1] == pytest.approx(trained[0].metrics["expert_losses"][-1], abs=0.5)
    assert all(a.a_RD.shape[0] == 4 for a in expert.adapters.values()), "no empty shards of ZeRO-3"


def test_small_batches_accumulate_to_the_same_step(trained, rows, tiny_folder, worker_env, tmp_path):
    """Also without keeping activations, and with the optimizer's states in CPU memory: all change memory, not results."""
    saving = {"micro_batch": 4, "gradient_checkpointing": True, "offload": "optimizer"}
    spec = make_spec(tiny_folder, "saving", training=TrainingConfig(cpus_per_worker=1, **saving))
    spec = spec.model_copy(update={"router": RouterConfig(steps=4, statistics_rows=50)})
    result = run_training(spec, rows, storage=tmp_path, worker_env=worker_env)
    expected, actual = trained[0].metrics, result.metrics
    assert actual["samples"] == expected["samples"] == 12 * 16
    assert len(actual["expert_losses"]) == 12
    assert actual["expert_losses"] == pytest.approx(expected["expert_losses"], rel=0.05)
    expert = Expert.load(result.expert)
    assert {statistics.count for statistics in [expert.statistics, *expert.layer_statistics.values()]} == {50}


def test_experts_learn_from_features_as_from_pixels(trained, worker_env, tiny_folder, tmp_path):
    """The vision tower's answers are kept on disk; those who train do not load it."""
    part = TaskRows(SourceConfig(path="demo://digits/train", limit=ROWS), key="rows")
    settings = {
        "base": BaseModelConfig(path=str(tiny_folder)), "data_folder": tmp_path, "quarantine": tmp_path, "answer": True,
        "embeds_folder": tmp_path / "features",
    }  # fmt: skip
    prepared = prepare({"digits": part}, DataConfig(vision_cache="features"), **settings)
    written = [file.stat().st_mtime_ns for file in (tmp_path / "features" / "digits-rows").glob("*.parquet")]
    spec = make_spec(tiny_folder, "features", training=ONE).model_copy(update={"vision": False})
    result = run_training(spec, prepared.training_rows(["digits"]), storage=tmp_path, worker_env=worker_env)
    assert result.metrics["expert_losses"] == pytest.approx(trained[0].metrics["expert_losses"], rel=1e-3)
    again = prepare({"digits": part}, DataConfig(vision_cache="features"), **settings)
    assert again.counts == prepared.counts == {"digits": ROWS}
    files = (tmp_path / "features" / "digits-rows").glob("*.parquet")
    assert written == [file.stat().st_mtime_ns for file in files] != [], "computed once"


def test_rows_that_stream_are_learned_by_several_workers_though_one_is_killed(
    trained, worker_env, tiny_folder, tmp_path
):
    """The run goes on at its checkpoint, with the rows that would have come: it ends with the same expert to the bit."""
    prepared = prepare(
        {"digits": TaskRows(SourceConfig(path="demo://digits/train", limit=ROWS))},
        DataConfig(cache="none", shuffle_rows=32),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=tmp_path,
        quarantine=tmp_path,
        answer=True,
    )
    rows = prepared.training_rows(["digits"])
    training = TrainingConfig(
        workers=2, cpus_per_worker=1, zero_stage=2, micro_batch=4, checkpoint_every=4, max_failures=1
    )
    killed: list[int] = []

    def kill_once(steps) -> None:
        if not killed and any(step.step >= 6 for step in steps):
            kill(killed)

    whole = run_training(
        make_spec(tiny_folder, "streamed", training=training), rows, storage=tmp_path, worker_env=worker_env
    )
    assert whole.metrics["samples"] == 12 * 16
    assert whole.metrics["expert_losses"][-1] == pytest.approx(trained[0].metrics["expert_losses"][-1], abs=0.5)
    spec = make_spec(tiny_folder, "streamed-killed", training=training)
    result = run_training(spec, rows, storage=tmp_path, on_steps=kill_once, worker_env=worker_env)
    assert killed
    assert_same_expert(Expert.load(result.expert), Expert.load(whole.expert))


def test_workers_that_keep_dying_end_the_job_and_nothing_else(
    trained, session, rows, tiny_folder, worker_env, tmp_path
):
    def kill_each_time(steps) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                environment = process.environ()
                if environment.get("POINTSMAN_TEST") == "mortal" and "RayTrainWorker" in " ".join(
                    process.cmdline()[:1]
                ):
                    process.kill()

    training = ONE.model_copy(update={"max_failures": 0})
    spec = make_spec(tiny_folder, "mortal", training=training, steps=60)
    with training_session(training, storage=tmp_path, worker_env=worker_env | {"POINTSMAN_TEST": "mortal"}) as opened:
        with pytest.raises(TrainingError, match="task 'digits': training failed: .*died"):
            opened.train(spec, rows, kill_each_time)
        short = make_spec(tiny_folder, "short", training=training, steps=2)
        assert opened.train(short, rows).expert.is_dir(), "other workers take their place"


def test_an_expert_that_learned_nothing_is_refused(rows, tiny_folder, worker_env, tmp_path):
    spec = make_spec(tiny_folder, "idle", training=ONE, learning_rate=1e-60, steps=2)
    with pytest.raises(TrainingError, match="every LoRA B is zero"):
        run_training(spec, rows, storage=tmp_path, worker_env=worker_env)
