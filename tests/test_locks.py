"""Locks between real processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline import locks
from pipeline.locks import LockedError, file_lock, made_once

HOLD = """
import sys, time
from pathlib import Path
from pipeline.locks import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holding(file: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(file), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_who_holds_it_is_said(tmp_path: Path) -> None:
    with (
        holding(tmp_path / "lock") as process,
        pytest.raises(LockedError) as error,
        file_lock(tmp_path / "lock", wait=False),
    ):
        pass
    assert f"process {process.pid} on " in error.value.holder


def test_the_kernel_releases_it_when_its_holder_is_killed(tmp_path: Path) -> None:
    with holding(tmp_path / "lock") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with file_lock(tmp_path / "lock", wait=False):
            pass


def test_whoever_waits_long_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENT_SECONDS", 0.0)
    messages: list[str] = []
    with (
        holding(tmp_path / "lock", seconds=0.5) as process,
        file_lock(tmp_path / "lock", on_wait=messages.append, why="which makes it"),
    ):
        pass
    (sentence,) = messages
    assert sentence.startswith(f"waiting for process {process.pid} on ")
    assert ", which makes it" in sentence


def test_a_lock_left_by_another_machine_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lock").write_text('{"host": "elsewhere", "pid": 7, "since": "yesterday"}')
    with file_lock(tmp_path / "lock"):
        pass
    assert "process 7 on elsewhere (since yesterday) did not release it" in caplog.text
    assert (tmp_path / "lock").read_text() == ""


def _slowly(unfinished: Path, writers: Path) -> None:
    unfinished.mkdir()
    for part in range(5):
        (unfinished / str(part)).write_text("whole")
        time.sleep(0.02)
    with writers.open("a") as file:
        file.write("x")


def _make(folder: Path) -> list[str]:
    made_once(folder / "made", lambda unfinished: _slowly(unfinished, folder / "writers"), why="", mark="done")
    return [(folder / "made" / str(part)).read_text() for part in range(5)]


def test_of_processes_that_make_the_same_one_writes(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()  # without its mark: left half made
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as processes:
        assert list(processes.map(_make, [tmp_path] * 4)) == [["whole"] * 5] * 4
    assert (tmp_path / "writers").read_text() == "x"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "made.lock", "writers"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "made", fail, why="")
    assert [file.name for file in tmp_path.iterdir()] == ["made.lock"]
