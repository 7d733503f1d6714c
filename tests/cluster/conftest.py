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

from cluster.local import ClusterInfo, connect
from cluster.preflight import extensions_folder

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180  # seconds, for machines that do other things meanwhile


@pytest.fixture(scope="module")
def local_ray() -> Iterator[ClusterInfo]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield connect()
        ray.shutdown()


@dataclass(frozen=True)
class Head:
    """A running head: its job server, its token, and the environment of a client that has the token."""

    address: str
    token: str
    client: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` and a second node, with ports, token and temporary folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))  # short: Ray puts sockets into it
    token = uuid.uuid4().hex
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text(token)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "OMP_NUM_THREADS"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    client = clean | {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT)}
    nodes = client | {"TORCH_EXTENSIONS_DIR": str(extensions_folder()), "RAY_AUTH_MODE": "token"}
    del nodes["PYTHONPATH"]  # jobs find the code in their working folder
    ports = [free_port() for _ in range(4)]
    output = (folder / "nodes.log").open("w")

    def start(*options: str) -> subprocess.Popen[bytes]:
        command = ["ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        return subprocess.Popen(command, env=nodes, stdout=output, stderr=subprocess.STDOUT)

    processes = [
        start(
            *("--head", f"--port={ports[0]}", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[1]}"),
            *(f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={folder}/ray"),
        )
    ]
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        wait_for(address, processes, folder / "nodes.log")
        processes.append(start(f"--address=127.0.0.1:{ports[0]}", f"--dashboard-agent-listen-port={ports[3]}"))
        # No job before both are up: nodes of one machine share a folder, and one that starts clears it of jobs' files.
        wait_for(address, processes, folder / "nodes.log")
        yield Head(address, token, client)
    finally:
        alive = [psutil.Process(node.pid) for node in processes if node.poll() is None]
        family = [member for node in alive for member in (node, *node.children(recursive=True))]
        for member in alive:
            member.terminate()
        for survivor in psutil.wait_procs(family, timeout=20)[1]:
            survivor.kill()
        output.close()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, nodes: list[subprocess.Popen[bytes]], output: Path) -> None:
    """Waits until all nodes have started and the job server answers, be it with a refusal."""
    deadline = time.monotonic() + PATIENCE
    while True:
        printed = output.read_text()
        assert all(node.poll() is None for node in nodes), printed
        assert time.monotonic() < deadline, printed
        try:
            requests.get(f"{address}/api/version", timeout=10)
        except requests.RequestException:
            time.sleep(0.5)
        else:
            if printed.count("Ray runtime started") == len(nodes):
                return
            time.sleep(0.5)
