"""A Ray head of its own on this machine, as jobs are submitted to: for benchmarks and tests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from cluster.local import SPARE_CPUS, available_cpus
from pipeline.errors import UserError

PATIENCE = 180.0
"""Seconds that the head may take to start, on a machine that does other things meanwhile."""


class HeadError(UserError):
    """A node did not start; the message holds what it printed."""


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str
    """Its job server."""
    gcs: str
    """host:port of its control store, which other nodes and drivers join."""
    metrics: str
    """Where Prometheus would fetch its metrics."""
    folder: Path
    """Its logs and sockets."""


@contextmanager
def ray_head(cpus: int | None = None, environment: Mapping[str, str] = MappingProxyType({})) -> Iterator[Head]:
    """Starts a head on loopback with ports and a folder of its own; stops it, and nothing else, at the end.

    For `environment` see `started_node`. `cpus` are logical; default: as many as a Ray that a command starts here has.
    """
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))  # short: Ray puts sockets into it
    port, dashboard, agent, metrics = (free_port() for _ in range(4))
    command = [
        *("ray", "start", "--head", "--block", f"--num-cpus={cpus or available_cpus() + SPARE_CPUS}"),
        *("--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", f"--temp-dir={folder}/ray"),
    ]
    try:
        with started_node(command, folder / "head.log", environment):
            yield Head(
                f"http://127.0.0.1:{dashboard}",
                f"127.0.0.1:{port}",
                f"http://127.0.0.1:{metrics}/metrics",
                folder,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_node(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs a `ray start --block`; ends it, and all that it has started, at the end.

    `environment` is added to that of this process without Ray's variables and PYTHONPATH: jobs bring their code.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {name: value for name, value in own.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("w") as printed:
        node = subprocess.Popen(command, env={**own, **environment}, stdout=printed, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                raise HeadError(f"`{' '.join(command[:3])}` did not come up:\n{log.read_text()}")
            time.sleep(0.2)
        yield
    finally:
        if node.poll() is None:
            family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            node.terminate()
            for survivor in psutil.wait_procs(family, timeout=20)[1]:
                survivor.kill()


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
