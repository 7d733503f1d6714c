"""What has to be true before workers start: resources that suffice, and DeepSpeed's operator built.

Both would otherwise show as a hang: Ray Train asks for missing resources again and again, and DeepSpeed waits for ever
for the lock that a killed build has left (pytorch #189245).
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
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import UserError

log = logging.getLogger(__name__)

OP = "deepspeed_shm_comm"
"""DeepSpeed's shared-memory communication, the one operator that CPU training compiles."""

BUILD = """
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
"""


class PreflightError(UserError):
    """The cluster or the machine lacks something; the message says what and how to get it."""


def check_resources(
    *, workers: int, cpus_per_worker: float, gpus_per_worker: float = 0, extra_cpus: float = 0, trainings: int = 1
) -> None:
    """Raises PreflightError if the connected cluster can never run so many `trainings` at a time, of so many workers each.

    `extra_cpus`: logical CPUs for all else: readers, evaluators, trial drivers. Workers are placed on nodes one by one,
    so a worker must fit into one node, and the sum over nodes must hold all workers.
    """
    nodes = _nodes()
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    demand = f"{workers} worker(s) with {cpus_per_worker:g} CPU(s) and {gpus_per_worker:g} GPU(s) each"
    if trainings > 1:
        demand = f"training.parallel_tasks={trainings} of {demand}"
    if extra_cpus:
        demand += f", and {extra_cpus:g} more CPU(s) for data and evaluation"
    supply = f"the cluster has {cpus:g} CPU(s) and {gpus:g} GPU(s) on {len(nodes)} node(s)"
    if gpus_per_worker and not gpus:
        raise PreflightError(
            f"{demand}: there is no GPU; {supply}\n"
            f"    set training.gpu=false, or submit to a cluster with GPUs (--address)"
        )
    worker_slots = sum(_worker_slots(node, cpus_per_worker, gpus_per_worker) for node in nodes)
    if worker_slots < workers * trainings:
        fewer = f"training.parallel_tasks to {max(worker_slots // workers, 1)}, " if trainings > 1 else ""
        raise PreflightError(
            f"{demand}: only {worker_slots} worker(s) fit; {supply}\n"
            f"    lower {fewer}training.workers to {max(worker_slots // trainings, 1)} or training.cpus_per_worker, or take "
            "a larger cluster (--address)"
        )
    needed = workers * trainings * cpus_per_worker + extra_cpus
    if needed > cpus:
        fewer = "training.parallel_tasks, " if trainings > 1 else ""
        raise PreflightError(
            f"{demand}: {needed:g} CPUs in all; {supply}\n"
            f"    lower {fewer}training.workers, training.cpus_per_worker or evaluation.workers; a local Ray takes more "
            f"logical CPUs than the machine has (connect(cpus={needed:g}))"
        )


def trainings_that_fit(
    *,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    evaluators: int,
    cpus_per_evaluator: float,
    gpus_per_evaluator: float,
    spare_cpus: float,
) -> int:
    """Returns how many trainings of so many workers the connected cluster holds beside its `evaluators`, perhaps none.

    `spare_cpus` are for reading rows. Each worker and each evaluator lies on one node.
    """
    nodes = [dict(node) for node in _nodes()]
    for _ in range(evaluators):
        free = [node for node in nodes if _worker_slots(node, cpus_per_evaluator, gpus_per_evaluator)]
        if not free:
            return 0
        fullest = max(free, key=lambda node: (node.get("GPU", 0.0), node["CPU"]))
        fullest["CPU"] -= cpus_per_evaluator
        fullest["GPU"] = fullest.get("GPU", 0.0) - gpus_per_evaluator
    cpus = sum(node.get("CPU", 0.0) for node in nodes) - spare_cpus
    worker_slots = sum(_worker_slots(node, cpus_per_worker, gpus_per_worker) for node in nodes)
    return max(0, min(worker_slots // workers, int(cpus // (workers * cpus_per_worker))))


READER_CPUS = 1
"""CPUs that reading rows takes beside inference: Ray Data starts workers first, and then waits for rows."""


def check_inference(
    *,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float = 0,
    cpus_field: str = "training.cpus_per_worker",
) -> None:
    """Raises PreflightError if the connected cluster can never run this many evaluators.

    Ray Data would wait for the missing ones for ever. Image features and base prompts are read by the same number.
    `cpus_field` is the setting that gives `cpus_per_worker`.
    """
    nodes = _nodes()
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    demand = f"evaluation.workers={workers} with {cpus_per_worker:g} CPU(s) and {gpus_per_worker:g} GPU(s) each"
    supply = f"the cluster has {cpus:g} CPU(s) and {gpus:g} GPU(s) on {len(nodes)} node(s)"
    worker_slots = sum(_worker_slots(node, cpus_per_worker, gpus_per_worker) for node in nodes)
    fitting = min(worker_slots, int((cpus - READER_CPUS) // cpus_per_worker))
    if fitting < workers:
        fewer = "or evaluation.gpus_per_worker, " if gpus_per_worker > 1 else ""
        raise PreflightError(
            f"{demand}, and {READER_CPUS} CPU for reading rows: only {max(fitting, 0)} of them fit; {supply}\n"
            f"    lower evaluation.workers to {max(fitting, 1)}, {fewer}or {cpus_field}, or take a larger cluster "
            "(--address)"
        )


def _nodes() -> list[dict[str, float]]:
    """Returns every node's resources: of those alive, or under `ray up`'s autoscaler of the head and all that may come."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    plan = Path.home() / "ray_bootstrap_config.yaml"  # `ray up` puts it on the head, where jobs' drivers run
    if "RAY_ADDRESS" not in os.environ or not plan.is_file():
        return alive
    cluster = yaml.safe_load(plan.read_text())
    heads = [node for node in alive if "node:__internal_head__" in node]
    to_come = [
        node_type["resources"]
        for name, node_type in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
        for _ in range(node_type.get("max_workers", cluster["max_workers"]))
    ]
    return heads + to_come[: cluster["max_workers"]]


def _worker_slots(node: dict[str, float], cpus: float, gpus: float) -> int:
    """Returns how many workers of this size one node holds."""
    worker_slots = int(node.get("CPU", 0.0) // cpus)
    return min(worker_slots, int(node.get("GPU", 0.0) // gpus)) if gpus else worker_slots


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
    return Path.home() / ".cache" / "pointsman" / "torch_extensions" / built


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
        for tool, package in (("c++", "apt-get install g++"), ("ninja", "pip install ninja")):
            if shutil.which(tool, path=environment["PATH"]) is None:
                raise PreflightError(f"DeepSpeed on CPU compiles an operator and needs {tool}, not on PATH: {package}")
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
