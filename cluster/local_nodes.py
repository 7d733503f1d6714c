"""A Ray cluster of several nodes on this machine, on loopback: for trying out what a cluster does, and for tests.

- One process starts the nodes and ends with them; it outlives the command that has started it. A small file says where it is.
- Its GPUs are made up: they are booked like others, and nothing can compute on them.
- Every node is a raylet of its own, with its own object store; disk and code are this machine's.

`python -m cluster.local_nodes STATE` is that process; it reads what to start from its standard input.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from cluster.local import LOOPBACK, QUIET, ClusterError, has_gpu
from pipeline.files import user_cache, write_json
from pipeline.locks import LockedError, file_lock

STATE = user_cache("cluster.json")
"""Where the running cluster is written down."""

START_SECONDS = 180.0
"""How long all nodes together may take to start, on a machine that does other things."""

STOP_SECONDS = 20.0
"""How long they may take to end before they are killed."""

STORE_BYTES = 200 << 20
"""Object store of a node."""


@dataclass(frozen=True)
class LocalNode:
    """What a node pretends to have."""

    cpus: int = 2
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)
    """Custom resources, e.g. `accelerator_type:A100`."""


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster."""

    address: str
    """host:port for drivers (RAY_ADDRESS)."""
    dashboard: str
    """Address for jobs (--address)."""
    nodes: tuple[LocalNode, ...]
    """Those that run, the head first."""
    pid: int
    """The process that holds all nodes."""
    created: float
    """When it was started, in seconds since 1970: process ids are used again."""
    folder: str
    """Its logs and sockets."""
    lost: int = 0
    """Number of nodes that have ended by themselves, or were killed."""

    @property
    def runs(self) -> bool:
        """Whether its process is still there."""
        return self.process is not None

    @property
    def process(self) -> psutil.Process | None:
        """Its process, if it is still the same."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def running(state: Path = STATE) -> LocalCluster | None:
    """Returns the cluster that `start` has started, if it still runs."""
    try:
        values = json.loads(state.read_text())
    except (FileNotFoundError, ValueError):
        return None
    cluster = LocalCluster(**{**values, "nodes": tuple(LocalNode(**node) for node in values["nodes"])})
    return cluster if cluster.runs else None


def start(nodes: Sequence[LocalNode], state: Path = STATE) -> LocalCluster:
    """Starts a cluster and returns when all of its nodes are there; the first one is the head.

    Raises ClusterError if one runs already, or if Ray does not start.
    """
    try:
        with file_lock(state.with_suffix(".lock"), wait=False):
            if (cluster := running(state)) is not None:
                raise ClusterError(
                    f"a cluster of {len(cluster.nodes)} nodes runs already, at {cluster.dashboard}; end it with "
                    "`pointsman cluster down`"
                )
            return _start(nodes, state)
    except LockedError as error:
        raise ClusterError(
            f"{error.holder} is starting one; wait for it, then see `pointsman cluster status`"
        ) from None


def _start(nodes: Sequence[LocalNode], state: Path) -> LocalCluster:
    state.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pointsman-", dir="/tmp"))  # short: Ray puts sockets into it
    log = folder / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(state), str(folder)],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not for it
            text=True,
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps([asdict(node) for node in nodes]))
    process.stdin.close()
    until = time.monotonic() + START_SECONDS
    try:
        while (cluster := running(state)) is None:
            if process.poll() is not None or time.monotonic() > until:
                last = "\n".join(log.read_text().splitlines()[-8:])
                raise ClusterError(f"Ray did not start {len(nodes)} nodes on this machine ({log}):\n{last}")
            time.sleep(0.2)
    except BaseException:
        _end(psutil.Process(process.pid) if process.poll() is None else None)
        raise
    return cluster


def stop(state: Path = STATE) -> LocalCluster | None:
    """Ends the cluster that `start` has started, and nothing else; returns it, None if there is none."""
    cluster = running(state)
    if cluster is not None:
        _end(cluster.process)
        shutil.rmtree(cluster.folder, ignore_errors=True)
    state.unlink(missing_ok=True)
    return cluster


def _end(process: psutil.Process | None) -> None:
    """Ends a process and all below it; whoever does not end in time is killed."""
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.terminate()
        for survivor in psutil.wait_procs(family, timeout=STOP_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()


def _environment() -> dict[str, str]:
    """The environment of the nodes and of all that runs on them; the code is the one that this process uses."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **QUIET,
        **({} if has_gpu() else {"DS_ACCELERATOR": "cpu"}),
        # Several raylets share this machine: few idle workers, no metrics that nobody fetches.
        "RAY_num_workers_soft_limit": "1",
        "RAY_enable_metrics_collection": "0",
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        # Jobs say `python`, and the environment of this one may not be activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # Ray listens on every interface unless it believes that clusters are impossible, as on a Mac.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def main(state: Path, folder: Path, nodes: Sequence[dict[str, Any]]) -> None:
    """Starts the nodes, writes down where they are, and holds them until this process is told to end."""
    from ray._private.authentication.authentication_token_setup import (
        enable_token_auth_by_default,
        ensure_token_if_auth_enabled,
    )
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.services import wait_for_node

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    enable_token_auth_by_default()  # loopback is every user's of this machine
    ensure_token_if_auth_enabled(None, create_token_if_missing=True)
    started: list[Any] = []
    try:
        for number, node in enumerate(nodes):
            settings = RayParams(
                num_cpus=node["cpus"],
                num_gpus=node["gpus"],
                labels=node["labels"],
                resources=node["resources"],
                object_store_memory=STORE_BYTES,
                node_ip_address=LOOPBACK[0],
                temp_dir=str(folder / "ray"),
                # A node that unpacks a job's package begins by removing the folder: not that of the others, who read there.
                runtime_env_dir_name=f"runtime_resources-{number}",
                min_worker_port=0,
                max_worker_port=0,
                include_log_monitor=False,
                dashboard_host=LOOPBACK[0],
            )
            if started:
                settings.update_if_absent(gcs_address=started[0].gcs_address, node_manager_port=0)
                settings.dashboard_agent_listen_port = None  # a free one
            started.append(Node(settings, head=not started, shutdown_at_exit=True, spawn_reaper=True))
            wait_for_node(started[0].gcs_address, started[-1].plasma_store_socket_name, START_SECONDS)
        head = started[0]
        cluster = LocalCluster(
            address=head.gcs_address,
            dashboard=f"http://{head.webui_url}",
            nodes=tuple(LocalNode(**node) for node in nodes),
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            folder=str(folder),
        )
        write_json(state, asdict(cluster))
        while (alive := [node.remaining_processes_alive() for node in started])[0]:
            if alive.count(False) != cluster.lost:
                left = tuple(LocalNode(**node) for node, runs in zip(nodes, alive, strict=True) if runs)
                cluster = replace(cluster, nodes=left, lost=alive.count(False))
                write_json(state, asdict(cluster))
            time.sleep(1)
    finally:
        for node in reversed(started):
            node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.load(sys.stdin))
