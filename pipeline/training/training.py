"""One training on one rank: what its stages share, from its rows to what it tells of itself."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from pipeline.data.loading.batch_loader import BatchLoader, StepLayout, distinct_batches
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.models.bases import Base
from pipeline.models.encoding import Encoded, collate_for
from pipeline.storage.mirror import Mirror
from pipeline.training.loop import StageClock
from pipeline.training.monitor import Monitor
from pipeline.training.ranks import agreed
from pipeline.training.reports import Reports
from pipeline.training.spec import TrainSpec
from pipeline.training.training_folder import TrainingFolder
from pipeline.training.zero import zero_config


class GivenUp(Exception):
    """Ends a training that nobody wants any more; adapters and engine are off the base."""


def step_layout(spec: TrainSpec, world: int) -> StepLayout:
    """Returns how the rows of a step are dealt over `world` ranks."""
    share = -(-spec.expert.batch_size // world)
    return StepLayout(spec.expert.batch_size, world, min(spec.training.micro_batch or share, share))


def deepspeed_config(spec: TrainSpec, world: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for a training on `world` ranks."""
    layout = step_layout(spec, world)
    return zero_config(
        spec.training,
        micro_batch=layout.micro_batch,
        accumulated=layout.accumulation,
        max_grad_norm=spec.expert.max_grad_norm,
    )


class Training:
    """A task's rows, layout, folder, reports and metrics, as one rank has them."""

    def __init__(
        self, spec: TrainSpec, rows: TrainingRows, queue: Any, storage: Mirror, folder: TrainingFolder
    ) -> None:
        context = ray.train.get_context()
        self.spec, self.rows = spec, rows
        self.held_out: TrainingRows | None = None
        if spec.validation:
            self.rows, self.held_out = rows.split(spec.validation, spec.seed)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.storage, self.folder = storage, folder
        folder.fetch()
        self.layout = step_layout(spec, self.world)
        self.dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
        self.reports = Reports(queue, spec.task, rank=self.rank)
        self.metrics: dict[str, Any] = {"samples": spec.expert.steps * spec.expert.batch_size}
        self._queue = queue
        self._began, self._before = time.monotonic(), 0.0

    def goes_on(self) -> tuple[Path | None, dict[str, Any]]:
        """Returns the last checkpoint and where it stands, or None and the beginning; its metrics and seconds are taken on."""
        checkpoint = self.folder.last()
        if checkpoint is None:
            return None, {"stage": "expert", "step": 0}
        progress = self.folder.progress()
        self._before = progress.get("seconds", 0.0)
        self.metrics |= progress["figures"]
        return checkpoint, progress

    def checkpoint(self, progress: dict[str, Any]) -> Path:
        """Starts a checkpoint that says where this training stands."""
        seconds = self._before + time.monotonic() - self._began
        return self.folder.checkpoint_dir(
            {"world": self.world, "seconds": seconds, "figures": self.metrics, **progress}
        )

    def zero_config(self) -> dict[str, Any]:
        """Returns DeepSpeed's configuration."""
        return deepspeed_config(self.spec, self.world)

    def loader(self, base: Base, steps: range, seed: int) -> BatchLoader:
        """Returns this rank's batches of `steps`; its rows are read from the moment at which it is entered."""
        return BatchLoader(
            self.rows,
            layout=self.layout,
            rank=self.rank,
            steps=steps,
            seed=seed,
            collate=partial(collate_for, base.processor),
            group_by_length=self.spec.group_by_length,
        )

    def distinct(
        self, rows: TrainingRows, *, count: int, micro_batch: int, seed: int
    ) -> Iterator[Sequence[Encoded] | None]:
        """Yields this rank's share of up to `count` distinct rows, in as many batches as every other rank's."""
        return distinct_batches(
            rows, count=count, micro_batch=micro_batch, rank=self.rank, workers=self.world, seed=seed
        )

    def monitor(self, stage: str, steps: int) -> Monitor:
        """Returns the monitor of a stage."""
        return Monitor(
            self.storage.local,
            self.spec.task,
            stage,
            rank=self.rank,
            steps=steps,
            rows_per_step=self.spec.expert.batch_size,
        )

    def note(self, stage: str, clock: StageClock) -> None:
        """Takes what a stage has cost into the metrics."""
        last = clock.losses[-20:]
        self.metrics |= {
            f"{stage}_seconds": clock.seconds,
            f"{stage}_wait_seconds": clock.wait_seconds,
            f"{stage}_loss": sum(last) / len(last),
            f"{stage}_losses": clock.losses,
            f"{stage}_step_seconds": clock.step_seconds,
        }

    def is_wanted(self) -> bool:
        """Whether somebody still waits for this training; all ranks ask alike."""
        return bool(agreed(ray.get(self._queue.is_wanted.remote()) if self.rank == 0 else None))
