import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.deepspeed_ops import BUILD, OP, build_deepspeed_ops, build_op, extensions_folder, remove_stale_lock
from cluster.preflight import PreflightError

pytestmark = pytest.mark.ray


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
