"""What every rank of a training session does: training after training on one base, an expert stage and a router stage each."""

import shutil
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from pipeline import json_logs
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.errors import StoredFileError
from pipeline.memory import free_memory
from pipeline.models.target_modules import adapted_paths
from pipeline.routing.adapters import ExpertError
from pipeline.storage.mirror import Mirror
from pipeline.training.expert_stage import run_expert_stage
from pipeline.training.given import given_folder
from pipeline.training.held_base import HeldBase
from pipeline.training.loop import Divergence
from pipeline.training.ranks import agreed
from pipeline.training.router_stage import run_router_stage
from pipeline.training.spec import GivenAdapter, TrainSpec
from pipeline.training.training import GivenUp, Training, deepspeed_config
from pipeline.training.training_folder import ADAPTER, TrainingFolder, training_folder
from pipeline.training.zero import deepspeed

ALREADY_FINISHED = "found"
"""Key in a training's outcome: it was finished before, so its steps are not reported."""

GIVEN_UP = "given up"
"""Key in a training's outcome: nobody wanted it any more, and it can go on from its last checkpoint."""


def train(settings: dict[str, Any]) -> None:
    """Works on the session's trainings until there are no more; Ray Train runs this on every rank.

    `settings`: the `queue`, the run's `storage`, and the settings of the training that is `expected` first, if that is known. A
    training's outcome is rank 0's metrics (losses, seconds and data wait of
    both stages), `failure` with the reason where a retry would fail again (divergence, nothing learned, a damaged file), or
    GIVEN_UP: all ranks see those alike. What one rank alone meets must be raised: the others would wait for it.
    """
    with settings["storage"].on_this_node() as storage:
        _train(settings["queue"], storage, settings["expected"])


def _train(queue: Any, storage: Mirror, expected: dict[str, Any] | None) -> None:
    rank, base = ray.train.get_context().get_world_rank(), HeldBase()
    if json_logs.are_wanted():
        json_logs.use_json_logs(run=storage.local.parent.name, rank=rank)
    queue.enter.remote(rank, ray.get_runtime_context().current_actor)
    number = agreed(ray.get(queue.first.remote()) if rank == 0 else None)
    try:
        if expected is not None:  # what takes seconds is done before the first training is there
            spec = TrainSpec.model_validate(expected)
            base.get(spec, deepspeed_config(spec, ray.train.get_context().get_world_size()))
            deepspeed()
        while (entry := ray.get(queue.take.remote(number))) is not None:
            spec = TrainSpec.model_validate(entry[0])
            folder = training_folder(storage, spec.task, spec.digest, rank)
            # Workers may have died after the last step, before they reported it; those of a driver that was killed go on for
            # a moment.
            finished = agreed(folder.metrics() if rank == 0 else None)
            metrics = (
                _outcome(spec, ray.get(entry[1][0]), queue, storage, folder, base)
                if finished is None
                else finished | {ALREADY_FINISHED: True}
            )
            entry = None  # the rows
            folder.forget()
            free_memory()
            if rank == 0:
                ray.get(queue.finish.remote(number, metrics))
            number += 1
    finally:
        base.drop()


def _outcome(
    spec: TrainSpec, rows: TrainingRows, queue: Any, storage: Mirror, folder: TrainingFolder, base: HeldBase
) -> dict[str, Any]:
    """Does one training; returns its outcome."""
    training = None
    try:
        training = Training(spec, rows, queue, storage, folder)
        _run(training, base)
        return training.metrics
    except GivenUp:
        return {GIVEN_UP: True}
    except (Divergence, ExpertError, StoredFileError) as error:
        base.drop()  # adapters and engine are still on it
        return {"failure": str(error)}
    finally:
        if training is not None:
            training.reports.send()  # the last losses before a failure are those one wants to see


def _run(training: Training, held: HeldBase) -> None:
    """Runs what the last checkpoint leaves to do, both stages on one base: the LoRA is taken off, gates come on."""
    spec = training.spec
    torch.set_num_threads(spec.training.cpus_per_worker)
    checkpoint, progress = training.goes_on()
    base = held.get(spec, training.zero_config())
    adapted_paths(base.model, base.family, spec.expert.target_modules)
    if spec.adapter is not None:
        adapter = _given(training, spec.adapter)
    elif progress["stage"] == "expert":
        adapter = run_expert_stage(training, base, checkpoint, progress)
        free_memory()
    else:
        assert checkpoint is not None
        adapter = checkpoint / ADAPTER
    if spec.router_stage:
        run_router_stage(training, base, adapter)
    elif training.rank == 0:
        training.folder.finish(
            training.metrics, lambda checkpoint_dir: shutil.copytree(adapter, checkpoint_dir / ADAPTER)
        )


def _given(training: Training, given: GivenAdapter) -> Path:
    """Returns the folder of an adapter that was trained elsewhere, in place of an expert stage that takes no time."""
    folder = given_folder(given, training.storage)
    training.metrics |= {"samples": 0, "expert_seconds": 0.0, "expert_wait_seconds": 0.0}
    training.metrics |= {"expert_losses": [], "expert_step_seconds": []}
    return folder
