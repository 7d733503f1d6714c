"""Small trainings of real workers: what they are made of, how they are killed, when two of them are equal."""

import json
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pipeline.config import BaseModelConfig, ExpertConfig, RouterConfig, TrainingConfig
from pipeline.routing.expert import Expert
from pipeline.training.spec import TrainSpec

ROWS = 100
"""Not a multiple of the batch size: a step of each stage lies on the border of an epoch."""

ONE = TrainingConfig(cpus_per_worker=1, checkpoint_every=4)


def make_spec(
    tiny_folder: Path, digest: str, *, training: TrainingConfig, learning_rate: float = 5e-3, steps: int = 12
) -> TrainSpec:
    return TrainSpec(
        task="digits",
        digest=digest,
        data_fingerprint="data",
        seed=3,
        base=BaseModelConfig(path=str(tiny_folder)),
        expert=ExpertConfig(rank=4, steps=steps, batch_size=16, learning_rate=learning_rate),
        router=RouterConfig(steps=7),
        training=training,
    )


def kill(killed: list[int]) -> None:
    """Kills all training workers; notes which they were."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended, or a zombie, since the list was made
            if "RayTrainWorker" in " ".join(process.cmdline()[:1]):
                process.kill()
                killed.append(process.pid)


def assert_same_expert(one: Expert, other: Expert) -> None:
    for path, adapter in one.adapters.items():
        assert torch.equal(adapter.a_RD, other.adapters[path].a_RD)
        assert torch.equal(adapter.b_OR, other.adapters[path].b_OR)
        assert torch.equal(one.vectors[path], other.vectors[path])
    assert torch.equal(one.statistics.scatter_FF, other.statistics.scatter_FF)
    assert json.loads(one.card.model_dump_json())["samples"] == other.card.samples
