"""DeepSpeed's operator for training on CPUs: compiled once on every node, before workers start.

Else DeepSpeed would wait for ever for the lock that a killed build has left (pytorch #189245).
"""

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution, version
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.preflight import PreflightError
from pipeline.files import user_cache

log = logging.getLogger(__name__)

OP = "deepspeed_shm_comm"
"""DeepSpeed's shared-memory communication, the one operator that CPU training compiles."""

BUILD = """
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
"""


def build_deepspeed_ops() -> dict[str, str]:
    """Builds DeepSpeed's CPU operator where workers can run, once; returns the environment that these workers need.

    40 s (idle machine) to 2 min the first time, milliseconds after that. In a cluster of several nodes every node with
    CPUs builds its own. Raises PreflightError without a compiler or if a build fails.

    PATH is part of the answer: a worker that finds another release of ninja than the build takes its log for damaged
    and compiles everything again, at the low priority that Ray gives to workers.
    """
    folder = extensions_folder()
    if not ray.is_initialized():
        build_op(folder)
    else:
        here = ray.get_runtime_context().get_node_id()
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        others = [node for node in nodes if node != here]
        task = ray.remote(num_cpus=0, max_retries=0)(_build_there)
        running = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)) for n in others]
        answers = [run.remote(folder) for run in running]
        if here in nodes:
            build_op(folder)
        failed = [f"node {n[:8]}: {message}" for n, message in zip(others, ray.get(answers), strict=True) if message]
        if failed:
            raise PreflightError("\n".join(failed))
    return _environment(folder)


def _environment(folder: Path) -> dict[str, str]:
    """What the build and all that load its result must have in common (the venv may not be activated in workers)."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder), "PATH": path}


def _build_there(folder: Path) -> str | None:
    """`build_op` as a task: the message travels as a value, since Ray would wrap the error in its own."""
    try:
        build_op(folder)
    except PreflightError as error:
        return str(error)
    return None


def extensions_folder() -> Path:
    """Returns TORCH_EXTENSIONS_DIR, or our own folder under ~/.cache, one for each Python environment.

    The build names the environment's paths: shared by two of them, every worker would compile it again. It has to be on a
    disk of the node: locks are judged by the processes of this machine.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given).resolve()
    # An environment that was made anew in the same place has newer headers: ninja would compile again, in the workers.
    made = Path(str(distribution("torch").locate_file("torch/version.py"))).stat().st_mtime_ns
    environment = hashlib.sha256(f"{sys.prefix} {sys.version} {made}".encode()).hexdigest()[:8]
    built = f"torch{version('torch')}-deepspeed{version('deepspeed')}-{environment}"
    return user_cache("torch_extensions") / built


def op_is_built(folder: Path) -> bool:
    """Returns whether the operator is there: then building it takes no time worth a word."""
    return (folder / f"{OP}.built").is_file() and (folder / OP / f"{OP}.so").is_file()


def build_op(folder: Path) -> bool:
    """Builds the operator into `folder` on this node; returns False if it was there already.

    Two callers at once: the second waits for the first. Raises PreflightError with the compiler's last lines.
    """
    done, library = folder / f"{OP}.built", folder / OP / f"{OP}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{OP}.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel releases it when its holder dies, unlike torch's lock file
        if remove_stale_lock(folder / OP / "lock"):
            done.unlink(missing_ok=True)  # whoever was killed may have been compiling
        if op_is_built(folder):
            return False
        environment = _environment(folder)
        check_tools()
        log.warning("building DeepSpeed's shared-memory operator in %s: 40 s to 2 min, only this first time", folder)
        began = time.perf_counter()
        # A process of its own: the caller stays free of torch and DeepSpeed, and a crash is only an error.
        command = [sys.executable, "-c", BUILD]
        build = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        if build.returncode or not library.is_file():
            tail = "\n".join((build.stdout + build.stderr).splitlines()[-25:])
            raise PreflightError(f"building DeepSpeed's operator in {folder} failed (exit {build.returncode}):\n{tail}")
        done.touch()
        log.warning("built in %.0f s", time.perf_counter() - began)
        return True


def check_tools() -> None:
    """Raises PreflightError where this machine has no compiler for the operator."""
    path = _environment(extensions_folder())["PATH"]
    for tool, package in (("c++", "apt-get install g++"), ("ninja", "pip install ninja")):
        if shutil.which(tool, path=path) is None:
            raise PreflightError(f"DeepSpeed on CPU compiles an operator and needs {tool}, not on PATH: {package}")


def remove_stale_lock(lock: Path) -> bool:
    """Removes torch's lock file of a killed build; returns whether it did.

    The builder keeps the file open as long as it holds it, so a lock that no process of this machine has open is stale.
    A lock of another user is left alone: its processes cannot be looked into.
    """
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if status.st_uid != os.getuid() or _is_open(status.st_dev, status.st_ino):
        return False
    lock.unlink(missing_ok=True)
    log.warning("removed %s, left by a build that was killed", lock)
    return True


def _is_open(device: int, inode: int) -> bool:
    """Returns whether a process of this user has the file open (Linux: /proc/<pid>/fd)."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except (PermissionError, FileNotFoundError):  # someone else's, or gone meanwhile
            continue
        for descriptor in descriptors:
            try:
                status = descriptor.stat()
            except (PermissionError, FileNotFoundError):
                continue
            if (status.st_dev, status.st_ino) == (device, inode):
                return True
    return False
