"""Submitting a stream to a running head: what it costs, that twice at once is one run, that kills change nothing.

python -m jobs.benchmark jobs
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from safetensors.torch import load_file

from cluster.client import Job, all_jobs, connected
from cluster.deepspeed_ops import build_op, extensions_folder
from jobs.benchmark.tools.ray_head import ray_head
from jobs.endings import user_errors
from jobs.options import DEMO
from jobs.terminal import Terminal, table
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.learning.run_status import LOCK, status_of
from pipeline.provenance import now, provenance

TARGETS = {"seconds_more": 10.0, "runs_of_two": 1.0, "difference": 1e-6}
"""Most that each figure should be."""

PATIENCE = 600.0
"""Seconds after which something that must happen has not."""

WORKER = "RayTrainWorker"
"""What Ray calls the processes that train."""


class NotSeenError(UserError):
    """Something that the benchmark waits for has not happened."""


def jobs(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each of the two tasks.", min=20)] = 120,
    output: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs"),
    address: Annotated[
        str | None, typer.Option(help="Job server of a head on this machine; default: one is started.")
    ] = None,
) -> None:
    """Measure what submitting a stream costs, submit it twice at once, and kill terminal, driver and worker."""
    with user_errors(), ExitStack() as stack:
        terminal, started = Terminal(), now()
        folder = (output / "benchmark-jobs").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_op(extensions_folder())  # no part of any figure
        bench = Bench(folder, steps, address or stack.enter_context(ray_head()).address, terminal)
        direct, submitted = bench.timed("direct"), bench.timed("submitted", there=True)
        results: dict[str, Any] = {
            "steps": steps,
            "seconds_direct": direct,
            "seconds_submitted": submitted,
            "seconds_more": submitted - direct,
            **bench.twice(),
            **bench.killed(),
        }
        results["difference"] = max(bench.difference(name) for name in ("submitted", "twice", "killed"))
        write_json(folder / "summary.json", provenance("benchmark-jobs", started) | {"jobs": results})
        rows = [
            [name, f"{results[name]:.3g}", f"<= {most:g}", "yes" if results[name] <= most else "NO"]
            for name, most in TARGETS.items()
        ]
        terminal.show(table("Submitted jobs", ["", "measured", "target", "met"], rows))
        terminal.log(f"summary    {folder / 'summary.json'}")


class Bench:
    """The same small stream, here and on the head, in an output folder per measurement."""

    def __init__(self, folder: Path, steps: int, address: str, terminal: Terminal) -> None:
        self.folder, self.address, self.terminal = folder, address, terminal
        tasks = yaml.safe_load(DEMO.read_text())["stream"]["tasks"]
        changes = {
            "extends": str(DEMO),
            "stream": {"tasks": [t for t in tasks if t["name"] in ("digits", "successor")], "benchmarks": []},
            "expert": {"steps": steps},
            "training": {"parallel_tasks": 1, "checkpoint_every": 20},
            "evaluation": {"workers": 1, "limit": 64},
        }
        (folder / "stream.yaml").write_text(yaml.safe_dump(changes))
        self.client = connected(address)

    def start(self, name: str, *, there: bool) -> "subprocess.Popen[str]":
        """Starts the command."""
        words = ["learn", "stream.yaml", f"name={name}", f"output={self.folder / 'outputs' / name}"]
        where = ["--address", self.address] if there else []
        return subprocess.Popen(
            [sys.executable, "-m", "jobs", *words, *where],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(DEMO.parents[2])},
            stdout=(self.folder / f"{name}-{time.monotonic_ns()}.log").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def timed(self, name: str, *, there: bool = False) -> float:
        """Returns the seconds that the command takes."""
        with self.terminal.working(f"{name}: two tasks"):
            began = time.monotonic()
            code = self.start(name, there=there).wait()
        if code:
            raise NotSeenError(f"{name} ended with {code}; see {self.folder}/{name}-*.log")
        return time.monotonic() - began

    def twice(self) -> dict[str, Any]:
        """Submits the same stream twice at once."""
        with self.terminal.working("the same twice at once"):
            both = [self.start("twice", there=True) for _ in range(2)]
            codes = [client.wait() for client in both]
        return {"runs_of_two": len(self._jobs("twice")), "exit_codes_of_two": codes}

    def killed(self) -> dict[str, Any]:
        """Kills the terminal, then the driver, then a training worker, submitting again after each."""
        with self.terminal.working("killing terminal, driver and worker"):
            client = self.start("killed", there=True)
            self._until_training("killed")
            client.kill()
            client.wait()
            again = self.start("killed", there=True)
            time.sleep(5)
            attached = len(self._jobs("killed")) == 1 and again.poll() is None
            os.kill(self._driver("killed"), signal.SIGKILL)
            code_of_killed = again.wait()
            last = self.start("killed", there=True)
            self._until_training("killed", since=time.time())
            workers = [p for p in psutil.process_iter(["cmdline"]) if WORKER in " ".join(p.info["cmdline"] or [])]
            for worker in workers:
                worker.kill()
            code = last.wait()
        return {
            "attached_after_terminal": attached,
            "exit_code_of_killed_driver": code_of_killed,
            "workers_killed": len(workers),
            "jobs_of_killed": len(self._jobs("killed")),
            "exit_code_at_last": code,
        }

    def _jobs(self, name: str) -> list[Job]:
        return [job for job in all_jobs(self.client, self.address) if job.metadata.get("run") == name]

    def _run(self, name: str) -> Path:
        return self.folder / "outputs" / name / name

    def _driver(self, name: str) -> int:
        return int(json.loads((self._run(name) / LOCK).read_text())["pid"])

    def _until_training(self, name: str, since: float = 0.0) -> None:
        def trains() -> bool:
            status = status_of(self._run(name)) if self._run(name).exists() else None
            file = self._run(name) / "state" / "status.json"
            return status is not None and " stage " in status.progress and file.stat().st_mtime > since

        _until(trains, f"{name} trains")

    def difference(self, name: str) -> float:
        """Returns the largest difference between a weight of the experts of this run and of the direct one."""
        here, there = (
            sorted((self.folder / "outputs" / run / "experts").rglob("*.safetensors")) for run in ("direct", name)
        )
        if [file.name for file in here] != [file.name for file in there] or not here:
            return float("inf")
        return max(
            float((tensor.double() - other[key].double()).abs().max())
            for file, its in zip(here, there, strict=True)
            for other in [load_file(its)]
            for key, tensor in load_file(file).items()
            if tensor.numel()
        )


def _until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise NotSeenError(f"not seen within {PATIENCE:.0f} s: {what}")
        time.sleep(0.5)
