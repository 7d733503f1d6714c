"""Checkpoints of a training worker: made in one temporary folder, handed to Ray Train, shared between ranks."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from pipeline.training.randomness import load_random_state, save_random_state

PROGRESS, ADAPTER, ENGINE, EXPERT = "progress.json", "adapter", "engine", "expert"
"""What a checkpoint holds: where it stands; the adapter once it is trained; until then DeepSpeed's trainable weights and
optimizer; at the end the expert."""


def save_state(engine: Any, folder: Path) -> None:
    """Writes an engine's trainable weights and optimizer and the rank's random state; every rank calls it."""
    engine.save_checkpoint(str(folder / ENGINE), tag="last", exclude_frozen_parameters=True)
    save_random_state(folder / f"random-{dist.get_rank()}.safetensors")


def load_state(engine: Any, folder: Path) -> None:
    """Reads what `save_state` wrote with as many ranks; training then goes on as if it had not been interrupted."""
    engine.load_checkpoint(str(folder / ENGINE), load_module_strict=False)
    load_random_state(folder / f"random-{dist.get_rank()}.safetensors")


class Staging:
    """The temporary folder of one rank; as a context manager it is removed at the end, after errors too."""

    def __init__(self, task: str, rank: int) -> None:
        self._task, self._rank = task, rank

    def __enter__(self) -> "Staging":
        self._folder = Path(tempfile.mkdtemp(prefix="pointsman-"))
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def checkpoint(self, progress: dict[str, Any]) -> Path:
        """Starts a checkpoint of this rank; rank 0 writes down where it stands."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        if self._rank == 0:
            (folder / PROGRESS).write_text(json.dumps(progress))
        return folder

    def report(self, folder: Path) -> None:
        """Hands a checkpoint to Ray Train, which uploads it and removes it here.

        A barrier, so every rank calls it equally often.
        """
        ray.train.report(
            {"task": self._task},
            checkpoint=ray.train.Checkpoint(str(folder)),
            delete_local_checkpoint_after_upload=True,
        )

    def share(self, folder: Path) -> Path:
        """Returns a local copy of rank 0's folder, without its subfolders."""
        copy = Path(tempfile.mkdtemp(dir=self._folder))
        files = [{f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} if self._rank == 0 else {}]
        dist.broadcast_object_list(files, src=0)
        for name, content in files[0].items():
            (copy / name).write_bytes(content)
        return copy
