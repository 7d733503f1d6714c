"""What a training keeps on disk: its last checkpoint, then what came out. Made by all ranks, whole or not at all.

    <task>-<digest>/
      checkpoint/     progress.json, state.safetensors, random-<rank>.safetensors; or adapter/ once it is trained
      best-<step>/    the best adapter so far, where rows are held out
      finished/       figures.json, expert/ or adapter/

The folder lies in the run's storage, which all nodes see: on a shared file system, or at an address, of which every process
has a copy (`UploadedTrainingFolder`). Ray Train's own checkpoints belong to a run of it; a session is one such run for many
trainings, and each training must find its own again, whatever was trained in between.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from pipeline.errors import stored_file
from pipeline.storage.mirror import Folder, Mirror, fetch_folder
from pipeline.training.engine_state import gathered_state, put_state
from pipeline.training.randomness import load_random_state, save_random_state
from pipeline.training.validation import KEPT
from pipeline.training.validation import METRICS as KEPT_LAST

PROGRESS, ADAPTER, STATE, EXPERT = "progress.json", "adapter", "state.safetensors", "expert"
"""What a checkpoint holds: where it stands; the adapter once it is trained, until then its weights and optimizer, whole.
What is finished: the expert, or the adapter where there was no router stage."""
METRICS = "figures.json"
POINTER = "checkpoint.json"
"""File at an address that names the last checkpoint: nothing can be renamed there."""


def begun_anew(folder: Path) -> str:
    """Returns what to do about a damaged file in `folder`."""
    return f"remove the folder {folder}, and the task's training begins anew"


def save_state(engine: Any, folder: Path) -> None:
    """Writes an engine's trained weights and optimizer and the rank's random state; every rank calls it."""
    state = gathered_state(engine)
    if dist.get_rank() == 0:
        save_file(state, folder / STATE)
    save_random_state(folder / f"random-{dist.get_rank()}.safetensors")


def load_state(engine: Any, folder: Path, step: int, *, ranks: int) -> None:
    """Makes an engine go on after `step` with what `save_state` wrote, whatever the ZeRO stage of either.

    With as many `ranks` it goes on as if it had not been interrupted; with others, dropout alone draws other numbers.
    """
    with stored_file(folder / STATE, begun_anew(folder)):
        put_state(engine, load_file(folder / STATE), step)
    if ranks == dist.get_world_size():
        file = folder / f"random-{dist.get_rank()}.safetensors"
        with stored_file(file, begun_anew(folder)):
            load_random_state(file)


def training_folder(storage: Folder, task: str, digest: str, rank: int = 0) -> "TrainingFolder":
    """Returns a training's folder in a run's storage, as `rank` sees it."""
    place = Mirror.of(storage) / f"{task}-{digest}"
    return TrainingFolder(place.local, rank) if place.remote is None else UploadedTrainingFolder(place, rank)


class TrainingFolder:
    """A training's folder as one rank sees it; all ranks call `checkpoint_dir` and `commit` equally often."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path, self._rank = folder, rank
        self._checkpoint, self._before, self._checkpoint_dir = (
            folder / name for name in ("checkpoint", "before", "draft")
        )
        self.finished = folder / "finished"
        """What came out; there once the training is done."""

    def fetch(self) -> None:
        """Brings here what a training that goes on needs; on a shared file system it is here."""

    def metrics(self) -> dict[str, Any] | None:
        """Returns the metrics of a training that is done, None of one that is not."""
        file = self.finished / METRICS
        if not file.exists():
            return None
        with stored_file(file, begun_anew(self.finished)):
            return json.loads(file.read_text())

    def last(self) -> Path | None:
        """Returns the folder of the last checkpoint, None before the first."""
        # Where a process was killed between the two renames of `commit`, the one before it is still there.
        return next((folder for folder in (self._checkpoint, self._before) if (folder / PROGRESS).exists()), None)

    def progress(self) -> dict[str, Any]:
        """Returns where the last checkpoint stands."""
        checkpoint = self.last()
        assert checkpoint is not None, "callers have asked"
        with stored_file(checkpoint / PROGRESS, begun_anew(checkpoint)):
            return json.loads((checkpoint / PROGRESS).read_text())

    def seconds(self) -> float:
        """Returns how long a training took up to its last checkpoint."""
        return float(self.progress().get("seconds", 0.0)) if self.last() else 0.0

    def checkpoint_dir(self, progress: dict[str, Any]) -> Path:
        """Starts a checkpoint; returns the folder that every rank writes its part into."""
        if self._rank == 0:
            shutil.rmtree(self._checkpoint_dir, ignore_errors=True)
            self._checkpoint_dir.mkdir(parents=True)
            (self._checkpoint_dir / PROGRESS).write_text(json.dumps(progress))
        _meet()
        return self._checkpoint_dir

    def commit(self, checkpoint_dir: Path) -> Path:
        """Makes what was written the last checkpoint once every rank has written its part; returns its folder."""
        _meet()
        if self._rank == 0:
            shutil.rmtree(self._before, ignore_errors=True)
            if self._checkpoint.exists():
                self._checkpoint.rename(self._before)
            checkpoint_dir.rename(self._checkpoint)
            shutil.rmtree(self._before, ignore_errors=True)
        _meet()
        return self._checkpoint

    def finish(self, metrics: dict[str, Any], write: Callable[[Path], object]) -> None:
        """Has `write` put what came out into a folder, and ends the training; for one rank."""
        shutil.rmtree(self._checkpoint_dir, ignore_errors=True)
        self._checkpoint_dir.mkdir(parents=True)
        write(self._checkpoint_dir)
        (self._checkpoint_dir / METRICS).write_text(json.dumps(metrics))
        shutil.rmtree(self.finished, ignore_errors=True)
        self._checkpoint_dir.rename(self.finished)
        for folder in (self._checkpoint, *self.path.glob(f"{KEPT}*")):
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, folder: Path) -> None:
        """Hears of a folder that rank 0 has written beside the checkpoints, in place of others whose names begin alike."""

    def forget(self) -> None:
        """Hears that this process needs the folder no more."""


class UploadedTrainingFolder(TrainingFolder):
    """A training's folder at an address, and this process's own copy.

    Every rank uploads its part of a checkpoint into a folder of a new name; when all have, rank 0 names it in `POINTER`.
    """

    def __init__(self, place: Mirror, rank: int = 0) -> None:
        super().__init__(place.local, rank)
        assert place.remote is not None, "else it is a TrainingFolder"
        self._remote = place.remote

    def fetch(self) -> None:
        """Brings the last checkpoint and the best adapter here."""
        shutil.rmtree(self.path, ignore_errors=True)
        name = _agreed(
            self._pointed() if self._rank == 0 else None
        )  # workers of a driver that was killed may still write
        if name is not None:
            fetch_folder(self._remote / name, self._checkpoint)
        self._remote.download_folder(self.path, wanted=lambda name: name.startswith(KEPT))

    def metrics(self) -> dict[str, Any] | None:
        """Returns the metrics of a training that is done, and brings what came out here; None of one that is not."""
        if not self.finished.exists() and self._remote.exists(f"{self.finished.name}/{METRICS}"):
            fetch_folder(self._remote / self.finished.name, self.finished)
        return super().metrics()

    def seconds(self) -> float:
        """Returns how long a training took up to its last checkpoint."""
        name = self._pointed()
        content = None if name is None else (self._remote / name).read(PROGRESS)
        return 0.0 if content is None else float(json.loads(content).get("seconds", 0.0))

    def checkpoint_dir(self, progress: dict[str, Any]) -> Path:
        """Starts a checkpoint; returns the folder that this rank writes its part into."""
        shutil.rmtree(self._checkpoint_dir, ignore_errors=True)
        self._checkpoint_dir.mkdir(parents=True)
        if self._rank == 0:
            (self._checkpoint_dir / PROGRESS).write_text(json.dumps(progress))
        return self._checkpoint_dir

    def commit(self, checkpoint_dir: Path) -> Path:
        """Uploads a checkpoint; returns the folder here, with this rank's part and the adapter, if it has one."""
        name = _agreed(f"checkpoint-{uuid4().hex[:8]}") or ""
        (self._remote / name).upload_folder(checkpoint_dir)
        _meet()
        if self._rank == 0:
            before = self._pointed()
            self._remote.write(POINTER, name.encode())
            if before is not None:
                (self._remote / before).delete_all()
        _meet()
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        checkpoint_dir.rename(self._checkpoint)
        if self._rank != 0:
            (self._remote / name / ADAPTER).download_folder(self._checkpoint / ADAPTER)
        return self._checkpoint

    def finish(self, metrics: dict[str, Any], write: Callable[[Path], object]) -> None:
        """Has `write` put what came out into a folder, uploads it, and ends the training; for one rank."""
        super().finish(metrics, write)
        (self._remote / self.finished.name).upload_folder(self.finished, last=METRICS)
        self._remote.delete(name for name in self._remote.files() if not name.startswith(f"{self.finished.name}/"))

    def keep(self, folder: Path) -> None:
        """Uploads a folder that rank 0 has written, and deletes the others whose names begin alike."""
        (self._remote / folder.name).upload_folder(folder, last=KEPT_LAST)
        others = (name for name in self._remote.files() if name.startswith(KEPT))
        self._remote.delete(name for name in others if not name.startswith(f"{folder.name}/"))

    def forget(self) -> None:
        """Removes this process's copy."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _pointed(self) -> str | None:
        content = self._remote.read(POINTER)
        return None if content is None else content.decode()


def _agreed(name: str | None) -> str | None:
    """Returns rank 0's text on every rank."""
    texts = [name]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(texts, src=0)
    return texts[0]


def _meet() -> None:
    """Waits for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
