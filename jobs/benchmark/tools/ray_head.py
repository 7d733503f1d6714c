"""A Ray head of its own on this machine, as a benchmark's jobs are submitted to."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster.local import SPARE_CPUS, available_cpus
from pipeline.errors import UserError

PATIENCE = 120.0
"""Seconds that the head may take to start."""


class HeadError(UserError):
    """The head did not start; the message holds what it printed."""


@contextmanager
def ray_head() -> Iterator[str]:
    """Starts a head on loopback with ports and a folder of its own; yields the address of its job server, and stops it."""
    folder = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))  # short: Ray puts sockets into it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment.pop("PYTHONPATH", None)  # jobs bring their code
    ports = [_free_port() for _ in range(4)]
    command = [
        *("ray", "start", "--head", "--block", f"--num-cpus={available_cpus() + SPARE_CPUS}", "--disable-usage-stats"),
        *(
            "--node-ip-address=127.0.0.1",
            f"--port={ports[0]}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports[1]}",
        ),
        *(f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}", f"--temp-dir={folder}/ray"),
    ]
    log = folder / "head.log"
    with log.open("w") as printed:
        head = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in log.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise HeadError(f"`ray start --head` did not come up:\n{log.read_text()}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        family = (
            [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
            if head.poll() is None
            else []
        )
        head.terminate()
        for survivor in psutil.wait_procs(family, timeout=20)[1]:
            survivor.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
