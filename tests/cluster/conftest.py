"""Ray for the tests of this folder: a local one as jobs start it, and a real head with token authentication."""

import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import requests

from cluster.deepspeed_ops import extensions_folder
from cluster.local import ClusterInfo, connect
from jobs.benchmark.tools.ray_head import ray_head

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180  # seconds, for machines that do other things meanwhile


@pytest.fixture(scope="module")
def local_ray() -> Iterator[ClusterInfo]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.shutdown()  # another module's may still run
        yield connect()
        ray.shutdown()


@dataclass(frozen=True)
class Head:
    """A running head that demands a token, and the environment of a client that has it."""

    address: str
    metrics: str
    logs: Path
    token: str
    client: dict[str, str]
    home: Path
    """HOME of clients and jobs."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home, token = tmp_path_factory.mktemp("home"), uuid.uuid4().hex
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)
    node = {
        "HOME": str(home),
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
        "RAY_AUTH_MODE": "token",
        "RAY_metrics_report_interval_ms": "1000",
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    client = clean | {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}
    with ray_head(2, node) as running:
        assert requests.get(f"{running.address}/api/version", timeout=30).status_code == 401
        yield Head(running.address, running.metrics, running.folder, token, client, home)
