import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import ClusterInfo
from cluster.preflight import (
    BUILD,
    OP,
    PreflightError,
    build_deepspeed_ops,
    build_op,
    check_inference,
    check_resources,
    extensions_folder,
    remove_stale_lock,
)

pytestmark = pytest.mark.ray

PLAN = """
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}}
  gpu: {min_workers: 0, max_workers: 4, resources: {CPU: 16, GPU: 1}}
"""


def test_enough_resources_pass(local_ray: ClusterInfo) -> None:
    check_resources(workers=1, cpus_per_worker=2, extra_cpus=2)


def test_too_many_workers(local_ray: ClusterInfo) -> None:
    with pytest.raises(PreflightError, match=r"99 worker\(s\) with 2 CPU\(s\).*only \d+ worker\(s\) fit") as error:
        check_resources(workers=99, cpus_per_worker=2)
    assert "lower training.workers to" in str(error.value)


def test_no_cpus_left_for_data(local_ray: ClusterInfo) -> None:
    with pytest.raises(
        PreflightError, match=r"(?s)1 more CPU\(s\) for data and evaluation.*evaluation\.workers"
    ) as error:
        check_resources(workers=1, cpus_per_worker=local_ray.cpus, extra_cpus=1)
    assert f"connect(cpus={local_ray.cpus + 1:g})" in str(error.value)


def test_no_gpu(local_ray: ClusterInfo) -> None:
    with pytest.raises(PreflightError, match=r"(?s)there is no GPU.*training\.gpu=false"):
        check_resources(workers=1, cpus_per_worker=1, gpus_per_worker=1)


def test_too_many_evaluators(local_ray: ClusterInfo) -> None:
    """Ray Data would wait for them for ever."""
    check_inference(workers=1, cpus_per_worker=local_ray.cpus - 1)
    with pytest.raises(PreflightError, match=r"(?s)evaluation\.workers=99 with 1 CPU.*lower evaluation\.workers to \d"):
        check_inference(workers=99, cpus_per_worker=1)
    with pytest.raises(PreflightError, match=r"(?s)1 CPU for reading rows: only 0 of them fit"):
        check_inference(workers=1, cpus_per_worker=local_ray.cpus)
    with pytest.raises(PreflightError, match=r"(?s)2 GPU.*evaluation\.gpus_per_worker"):
        check_inference(workers=1, cpus_per_worker=1, gpus_per_worker=2)


def test_counts_nodes_that_the_autoscaler_may_add(local_ray: ClusterInfo, tmp_path, monkeypatch) -> None:
    (tmp_path / "ray_bootstrap_config.yaml").write_text(PLAN)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", local_ray.address)
    check_resources(workers=3, cpus_per_worker=8, gpus_per_worker=1, extra_cpus=8)
    with pytest.raises(PreflightError, match=r"only 3 worker\(s\) fit"):
        check_resources(workers=4, cpus_per_worker=8, gpus_per_worker=1)


def test_operator_is_built_once_and_workers_do_not_compile_again() -> None:
    environment = build_deepspeed_ops()
    folder = extensions_folder()
    assert environment["TORCH_EXTENSIONS_DIR"] == str(folder)
    assert environment["DS_ACCELERATOR"] == "cpu"
    library = folder / OP / f"{OP}.so"
    written = library.stat().st_mtime_ns
    assert build_op(folder) is False
    subprocess.run([sys.executable, "-c", BUILD], env=os.environ | environment, check=True, capture_output=True)
    assert library.stat().st_mtime_ns == written


def test_says_what_to_install_without_a_compiler(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreflightError, match=r"needs c\+\+, not on PATH: apt-get install g\+\+"):
        build_op(tmp_path / "extensions")


def test_removes_a_lock_only_when_its_holder_is_dead(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert remove_stale_lock(lock) is False
    hold = f"""
import time
from torch.utils.file_baton import FileBaton
baton = FileBaton({str(lock)!r})
print(baton.try_acquire(), flush=True)
time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert remove_stale_lock(lock) is False
    assert lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert remove_stale_lock(lock) is True
    assert not lock.exists()
