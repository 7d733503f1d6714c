"""A node that Ray drains, as clouds announce that a spot instance will be taken away; in a Ray of its own, since it is gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

STEPS = 600
"""More than are done before the checkpoint."""

DRIVER = """
import json, subprocess, sys, time
from contextlib import suppress
from pathlib import Path

import ray

from cluster.local import connect
from cluster.deepspeed_ops import build_deepspeed_ops
from pipeline.config import BaseModelConfig, DataConfig, ExpertConfig, RouterConfig, SourceConfig, TrainingConfig
from pipeline.data.loading.preprocess import TaskRows, prepare
from pipeline.training.spec import TrainSpec
from pipeline.training.training_folder import PROGRESS
from pipeline.training.session import training_session

base, folder, steps = BaseModelConfig(path=sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
cluster = connect()
part = TaskRows(SourceConfig(path="demo://digits/train", limit=64))
rows = prepare({"digits": part}, DataConfig(), base=base, data_folder=folder, quarantine=folder, answer=True)
training = TrainingConfig(workers=2, cpus_per_worker=1, checkpoint_every=steps)
job = TrainSpec(
    task="digits", digest="drained", data_fingerprint="data", seed=3, base=base, training=training,
    expert=ExpertConfig(rank=4, steps=steps, batch_size=4), router=RouterConfig(steps=7),
)
progress, drained, found = folder / "digits-drained" / "checkpoint" / PROGRESS, [], []

def drain_once(reported):
    if not drained and any(step.step >= 5 for step in reported):
        assert not progress.exists()
        subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address,
                "--node-id", ray.get_runtime_context().get_node_id(), "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "spot", "--deadline-remaining-seconds", "600",
            ],
            check=True, capture_output=True,
        )
        drained.append(time.monotonic())
    if progress.exists() and not found:
        found.append({"step": json.loads(progress.read_text())["step"], "seconds": time.monotonic() - drained[0]})
        raise KeyboardInterrupt  # the other steps are no part of this

with suppress(KeyboardInterrupt), training_session(training, storage=folder, worker_env=build_deepspeed_ops()) as session:
    session.train(job, rows.training_rows(["digits"]), drain_once)
print(json.dumps(found))
"""


def test_a_checkpoint_is_written_when_a_node_will_be_taken_away(tiny_folder: Path, tmp_path: Path):
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    clean["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1"  # which a Ray of one machine does without
    command = [sys.executable, "-c", DRIVER, str(tiny_folder), str(tmp_path), str(STEPS)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (actual,) = json.loads(done.stdout.splitlines()[-1])
    assert 5 <= actual["step"] < STEPS, "in the middle of the task, and not because it was time for one"
    assert actual["seconds"] < 60, "it does not wait for the task's end"
