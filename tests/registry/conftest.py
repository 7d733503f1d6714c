"""A fresh MLflow database for every test, and tiny experts for the untrained base."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline.config import RouterConfig
from pipeline.models.checkpoints import fingerprint
from pipeline.registry.tracking import open_tracking
from pipeline.routing import Expert, ExpertCard, Pool, PromptStatistics
from pipeline.routing.adapters import Adapter
from pipeline.routing.features import source_width
from pipeline.routing.store import CACHE_VARIABLE

WIDTH = 128
LINEAR = "model.language_model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Created:
    """A database that `open_tracking` made in a process of its own, and what that process printed."""

    path: Path
    printed: str


@pytest.fixture(scope="session")
def created(tmp_path_factory: pytest.TempPathFactory) -> Created:
    """Making the tables takes many seconds, copying the file none: tests copy this one."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    code = f"from pipeline.registry.tracking import open_tracking; open_tracking('sqlite:///{path}', 'first')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Created(path, done.stdout + done.stderr)


def new_experiment(created: Created, folder: Path) -> str:
    """Points MLflow at a new database in `folder` and returns the id of a new experiment in it."""
    folder.mkdir()
    shutil.copyfile(created.path, folder / "mlflow.db")
    return open_tracking(f"sqlite:///{folder}/mlflow.db", "pointsman")


@pytest.fixture
def experiment(tmp_path: Path, created: Created) -> Iterator[str]:
    """Id of a new experiment in its own database under `tmp_path`."""
    yield new_experiment(created, tmp_path / "store")
    while mlflow.active_run():
        mlflow.end_run()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of experts that registered pools share, empty."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


MakeExpert = Callable[..., Expert]


@pytest.fixture(scope="session")
def make_expert(tiny_folder: Path) -> MakeExpert:
    """Makes experts for the untrained base; an expert named `x` with digest `d` is always the same."""

    def make(name: str, digest: str, centre: float = 0.0, *, trained: bool = True) -> Expert:
        rank = 2
        random = torch.Generator().manual_seed(len(name))
        config = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": r".*\.q_proj",
            "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
        }  # fmt: skip
        b_OR = torch.randn(WIDTH, rank, generator=random) if trained else torch.zeros(WIDTH, rank)
        adapter = Adapter(torch.randn(rank, WIDTH, generator=random), b_OR, 2.0)
        features_NF = centre + torch.randn(64, source_width(WIDTH), generator=random)
        card = ExpertCard(
            name=name, task=name, base_fingerprint=fingerprint(tiny_folder), rank=rank, alpha=4, seed=0,
            data_fingerprint="d" * 64, config_digest=digest, samples=640, metrics={"expert_loss": 0.25, "seconds": 3.5},
        )  # fmt: skip
        return Expert(card, config, {LINEAR: adapter}, {LINEAR: torch.ones(WIDTH)}, PromptStatistics.of(features_NF))

    return make


@pytest.fixture(scope="session")
def make_pool(tiny_folder: Path) -> Callable[..., Pool]:
    """Makes pools of given experts over the untrained base, without a null expert."""

    def make(*experts: Expert) -> Pool:
        return Pool("untrained", fingerprint(tiny_folder), RouterConfig(), experts)

    return make
