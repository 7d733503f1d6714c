"""Ray for the tests of this folder: a local one as jobs start it, and a real head with token authentication."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import requests

from cluster.deepspeed_ops import extensions_folder
from cluster.local import ClusterInfo, connect

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
    """A running head: its job server, its token, and the environment of a client that has the token."""

    address: str
    token: str
    client: dict[str, str]
    home: Path
    """HOME of clients and jobs."""
    metrics: str
    """Where Prometheus would fetch the head's metrics."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` with ports, token and temporary folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))  # short: Ray puts sockets into it
    token = uuid.uuid4().hex
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(token)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    client = clean | {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT)}
    node = client | {"TORCH_EXTENSIONS_DIR": str(extensions_folder()), "RAY_AUTH_MODE": "token"}
    node["RAY_metrics_report_interval_ms"] = "1000"
    del node["PYTHONPATH"]  # jobs find the code in their working folder
    ports = [free_port() for _ in range(4)]
    with (folder / "head.log").open("w") as output:
        process = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--port={ports[0]}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}"),
                *(f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={folder}/ray"),
                f"--metrics-export-port={ports[3]}",
            ],
            env=node,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        wait_for(address, process, folder / "head.log")
        yield Head(address, token, client, folder, f"http://127.0.0.1:{ports[3]}/metrics")
    finally:
        if process.poll() is None:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            for survivor in psutil.wait_procs(family, timeout=20)[1]:
                survivor.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen[bytes], output: Path) -> None:
    """Waits until the head has started and its job server answers, be it with a refusal."""
    deadline = time.monotonic() + PATIENCE
    while "Ray runtime started" not in (printed := output.read_text()):
        assert process.poll() is None, printed
        assert time.monotonic() < deadline, printed
        time.sleep(0.5)
    assert requests.get(f"{address}/api/version", timeout=30).status_code == 401
