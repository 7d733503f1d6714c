"""Joins the Ray cluster at hand, or starts a small one on this machine.

- One call for every job: inside a submitted job it joins the job's cluster, with an address it joins that one, else
  it starts Ray here, reachable from this machine only.
- The terminal stays readable: what workers print goes to Ray's log folder, progress bars are off.
- Its settings reach the workers: a local Ray inherits the environment of this process, a running cluster gets them as
  the job's runtime environment.

Knows nothing of models, data or MLflow.
"""

import logging
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import ray
import ray.data
from ray._private import auto_init_hook, ray_constants, ray_logging
from ray.util.debug import log_once

from cluster import environment
from cluster.access import use_token
from cluster.submitted import runtime_env
from pipeline.errors import UserError

log = logging.getLogger(__name__)

SPARE_CPUS = 4
"""Logical CPUs beyond the real ones, for processes that mostly wait: readers of Ray Data, trial drivers, and training workers
while the evaluator answers.
Ray Train books its CPUs first, and Ray Data hangs when none is left."""

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's boxes and hints; the other form can be silenced
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the job ends by itself; Tune's own handler would carry on as if it were done
    # Ray's coming default, chosen now: CUDA_VISIBLE_DEVICES stays as it is in tasks without a GPU; silences a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The driver's part of Ray's C++ core prints to the terminal, a warning for every actor pool of Ray Data among it.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Tokenizers warn in every process that forks; Ray's processes are the parallelism here.
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment of the driver and of every worker; what the user has set stays. OMP_NUM_THREADS is not in it on purpose:
Ray sets it in each worker to the CPUs that the worker has booked, so `training.cpus_per_worker` is what torch gets."""

BANNER = b"Set ray log level from environment variable"
"""Line of Ray's core about RAY_BACKEND_LOG_LEVEL, the variable that makes it silent."""

LOOPBACK = ("127.0.0.1", "localhost")
"""This machine alone, in addresses."""


class ClusterError(UserError):
    """The cluster that was asked for cannot be joined; the message names the address and the remedy."""


@dataclass(frozen=True)
class ClusterInfo:
    """What `connect` found or started."""

    address: str
    """host:port of the cluster's control store."""
    started: bool
    """True if this process started it, and so ends it."""
    cpus: float
    """Logical CPUs over all nodes."""
    gpus: float
    """GPUs over all nodes."""
    nodes: int
    """Nodes alive."""
    dashboard: str | None
    """host:port of the dashboard, if there is one."""
    logs: Path
    """Folder of the workers' logs, on this node."""
    seconds: float
    """Time that joining or starting took."""


def connect(address: str | None = None, cpus: int | None = None) -> ClusterInfo:
    """Joins the cluster at `address` (or that of RAY_ADDRESS, or the job's own), or starts Ray on this machine.

    `cpus` is the number of logical CPUs of a local Ray; default: the machine's plus SPARE_CPUS. A second call returns
    the cluster that is already joined. Raises ClusterError if the address cannot be joined.
    """
    began = time.perf_counter()
    started = False
    if not ray.is_initialized():
        here, on_sigterm = starts_here(address), signal.getsignal(signal.SIGTERM)
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if here:
            _start(cpus if cpus is not None else available_cpus() + SPARE_CPUS)
            started = True
        else:
            if cpus is not None:
                log.warning("cpus=%d is ignored: the cluster at %s has its own", cpus, address)
            _join(address)
        # Ray takes the signal for itself; what this process wanted of it stays. Python's default would end it uncleaned.
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    # Every service of Ray Train and Ray Data is a process; from the eighth on Ray warns that there are many.
    if ray_logging.stdout_deduplicator.skip_re is None:  # what the user has set stays
        ray_logging.stdout_deduplicator.skip_re = re.compile("worker processes have been started")
    _quiet_data()
    context = ray.get_runtime_context()
    node = ray._private.worker._global_node
    assert node is not None, "joined above, never through Ray Client"
    resources = ray.cluster_resources()
    return ClusterInfo(
        address=context.gcs_address,
        started=started,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=sum(entry["Alive"] for entry in ray.nodes()),
        dashboard=node.webui_url or None,
        logs=Path(node.get_logs_dir_path()),
        seconds=time.perf_counter() - began,
    )


def starts_here(address: str | None = None) -> bool:
    """Returns whether `connect` would start Ray on this machine rather than join a cluster."""
    return not ray.is_initialized() and (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def _start(cpus: int) -> None:
    """Starts Ray here with `cpus` logical CPUs, all its ports on loopback."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _stay_on_loopback()
    # Nobody takes this machine away with notice, and on two cores every process that looks out for it slows training.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # A thread that still reads when this process is told to stop would start Ray anew.
    auto_init_hook.enable_auto_connect = False
    # Ray Train looks every 2 s and takes one report a look, and the next report waits for that: 8 s of a short training.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Ray keeps as many idle workers as there are logical CPUs; each holds 0.4 GB of imported libraries.
    os.environ.setdefault("RAY_num_workers_soft_limit", "2")
    # Of others the next pass over rows has use a moment later; a new process would import for six seconds again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "10000")
    # Ray keeps some hundred series of metrics for every data set that was read, 5 MB a task; nothing fetches them here.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    try:
        with _without_banner():
            ray.init(
                address="local",  # without it, Ray would join any cluster that it finds on this machine
                num_cpus=cpus,
                # Costs 2 to 4 s and 150 MB, and is worth it: without it Ray Train warns every second, and placement groups of
                # trials that were killed are never given back.
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:
        if type(error) is not Exception:
            raise
        # What Ray raises where one of its processes does not start within its fixed 30 s.
        raise ClusterError(
            f"Ray did not start on this machine: {next(iter(str(error).splitlines()), 'no reason given')}\n"
            "    is the machine very busy, or short of memory? Run the same command again"
        ) from error
    # Counts as said, that no CPU is free: preflight has counted those of this Ray, which nobody else uses, and who waits for
    # one waits for another reader.
    log_once("cpu_warning")


@contextmanager
def _without_banner() -> Iterator[None]:
    """Leaves out what Ray's C++ core writes to the terminal when it starts: where it has its log level from."""
    terminal = os.dup(2)
    with TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            for line in written:
                if BANNER not in line:
                    os.write(2, line)


def _stay_on_loopback() -> None:
    """Makes Ray take 127.0.0.1 for this machine's address, in this process and its children.

    It listens on every interface unless it believes that clusters are impossible, as on a Mac. It reads the variable when it is
    imported: this process, which has imported it, needs the constant too; the variable is for children.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def _answers(host: str, port: int) -> bool:
    """Returns whether something listens there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=10):
        return True
    return False


def _join(address: str) -> None:
    """Joins a running cluster; the settings go to its workers as this job's runtime environment."""
    if "://" in address:
        raise ClusterError(
            f"address {address!r}: a driver joins a cluster from one of its nodes, by host:port or `auto`; "
            f"from elsewhere submit the job: pointsman learn CONFIG --address http://HOST:8265"
        )
    use_token()
    # A key that the job already has must not be given again: Ray calls even equal values a conflict.
    job_variables = runtime_env().get("env_vars", {})
    settings = {name: os.environ[name] for name in QUIET if name not in job_variables}
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            # Ray itself tries for more than 7 minutes, with a warning every few seconds.
            socket.create_connection((host, int(port)), timeout=10).close()
            # Ray itself looks for a cluster on loopback at this machine's other address.
            if host in LOOPBACK and not _answers(ray.util.get_node_ip_address(), int(port)):
                _stay_on_loopback()
        given = {"worker_process_setup_hook": environment.HOOK} if environment.is_given() else {}
        with _without_banner():
            ray.init(
                address=address,
                runtime_env={"env_vars": settings, **given},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot join the Ray cluster at {address!r}: {error}\n"
            f"    check that it runs (`ray status --address {address}`) and that this user has its token "
            f"(~/.ray/auth_token or RAY_AUTH_TOKEN); to run on this machine alone, unset RAY_ADDRESS"
        ) from error


def _quiet_data() -> None:
    """Ray Data in this process: rows in a fixed order, no progress bars, only warnings on the terminal."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    # Ray's 128 MB a block are what a task holds until it hands rows on, and what waits between tasks; images are large.
    context.target_max_block_size = 32 << 20
    # Small sources, read often: the second reader lists files in processes of their own, 3 to 7 s for every source.
    context.use_datasource_v2 = False
    context.isolate_read_workers = False
    warnings.filterwarnings("ignore", module=r"ray\.data")  # hints on tuning, one for every small data set
    log_once("ray_data_progress_manager_disabled")  # counts as said: the bars are off on purpose
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # its log file in Ray's log folder keeps everything
            handler.setLevel(logging.WARNING)


def available_cpus() -> int:
    """Returns how many CPUs this process may use: its affinity, or its container's quota (cgroup v2) if less."""
    count = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def has_gpu() -> bool:
    """Returns whether this machine has an NVIDIA GPU, by the driver's device files (importing torch costs seconds)."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
