"""One Ray Train run for a task: both stages, restarts from checkpoints, and what comes out of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.config import TrainingConfig
from pipeline.errors import UserError
from pipeline.streams.training_rows import TrainingRows
from pipeline.training.staging import ADAPTER, EXPERT
from pipeline.training.telemetry import Step, listening
from pipeline.training.worker import Job, train

FEWEST_ROWS = 4
"""Rows from which the spread of a task's prompts can be told."""


class TrainingError(UserError):
    """A task that could not be trained; nothing was added to the pool."""


@dataclass(frozen=True)
class Trained:
    """What a task's run left behind."""

    checkpoint: Path
    """Folder of the last checkpoint."""
    figures: dict[str, Any]
    """Losses by step, seconds and data wait of both stages, samples."""

    @property
    def expert(self) -> Path:
        """Folder of the finished expert (adapter, routing vectors, statistics, card)."""
        return self.checkpoint / EXPERT

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter, where there was no router stage."""
        return self.checkpoint / ADAPTER


class _Trainer(TorchTrainer):
    """A trainer that leaves signals to the job, and nothing behind.

    Ray's own handler of SIGINT would end the process as if all were well, and holds the controller, 0.4 GB, for as long as
    no other training takes its place.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller  # called in the main thread only; elsewhere Ray registers nothing

    def end(self) -> None:
        """Ends the controller, and with it the workers if they still train."""
        if self._controller is not None:
            ray.kill(self._controller)
            self._controller = None


def run_training(
    job: Job,
    rows: TrainingRows,
    *,
    storage: Path,
    on_steps: Callable[[list[Step]], None] = lambda steps: None,
    worker_env: dict[str, str] | None = None,
) -> Trained:
    """Trains `job` on encoded rows; a run of the same task and digest under `storage` goes on where it stopped.

    Raises TrainingError when the loss diverges, the expert learned nothing, or workers keep dying.
    """
    training = job.training
    if rows.count < training.workers:
        raise TrainingError(f"task {job.task!r}: {rows.count} rows cannot be split among {training.workers} workers")
    if job.router_stage and rows.count < FEWEST_ROWS:
        raise TrainingError(
            f"task {job.task!r}: {rows.count} rows are too few for its statistics; at least {FEWEST_ROWS} are needed"
        )
    with listening(on_steps) as telemetry:
        trainer = _Trainer(
            train,
            train_loop_config=job.model_dump() | {"telemetry": telemetry, "rows": rows},
            torch_config=TorchConfig(backend="nccl" if training.gpu else "gloo"),
            scaling_config=scaling(training),
            run_config=RunConfig(
                # A name that says what is computed: Ray Train resumes whatever run bears it.
                name=f"{job.task}-{job.digest}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=training.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                worker_runtime_env={"env_vars": thread_variables(training) | (worker_env or {})},
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(f"task {job.task!r}: training failed: {error}") from error
        finally:
            trainer.end()
    figures = result.return_value
    if figures is None or "failure" in figures:
        raise TrainingError(f"task {job.task!r}: {figures['failure'] if figures else 'no worker finished'}")
    assert result.checkpoint is not None
    return Trained(Path(result.checkpoint.path), figures)


def scaling(training: TrainingConfig) -> ScalingConfig:
    """Returns the workers and what each of them holds: its threads' CPUs, and exactly one GPU where there are any."""
    resources: dict[str, float] = {"CPU": training.threads}
    if training.gpu:
        resources["GPU"] = 1
    return ScalingConfig(num_workers=training.workers, use_gpu=training.gpu, resources_per_worker=resources)


def thread_variables(training: TrainingConfig) -> dict[str, str]:
    """Returns the worker's environment; Ray would set one thread a process where this is silent."""
    return {
        "OMP_NUM_THREADS": str(training.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if training.gpu else "cpu",
        **{name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ},
    }
