"""Commands of the project in processes of their own, started, waited for and killed: for benchmarks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from jobs.options import DEMO
from pipeline.errors import UserError

PATIENCE = 600.0
"""Seconds after which something that must happen has not."""

WORKER = "RayTrainWorker"
"""What Ray calls the processes that train."""


class NotSeenError(UserError):
    """Something that a benchmark waits for has not happened."""


def start(folder: Path, name: str, *words: str) -> "subprocess.Popen[str]":
    """Starts `pointsman` with these words in a folder, where what it prints goes to a file named after `name`."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(DEMO.parents[2])},
        stdout=(folder / f"{name}-{time.monotonic_ns()}.log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def seconds_of(folder: Path, name: str, *words: str) -> float:
    """Returns the seconds that a command takes; raises NotSeenError where it fails."""
    began = time.monotonic()
    code = start(folder, name, *words).wait()
    if code:
        raise NotSeenError(f"{name} ended with {code}; see {folder}/{name}-*.log")
    return time.monotonic() - began


def until(happened: Callable[[], bool], what: str) -> None:
    """Waits for something; raises NotSeenError where it does not happen."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise NotSeenError(f"not seen within {PATIENCE:.0f} s: {what}")
        time.sleep(0.5)


def training_workers() -> list[psutil.Process]:
    """Returns the processes on this machine that train."""
    return [p for p in psutil.process_iter(["cmdline"]) if WORKER in " ".join(p.info["cmdline"] or [])]


def kill_training_workers() -> int:
    """Kills them, as by `kill -9`; returns how many there were."""
    workers = training_workers()
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    return len(workers)
