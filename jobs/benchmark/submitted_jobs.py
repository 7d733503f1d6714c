"""Submitting a stream to a running head: what it costs, that twice at once is one run, that kills change nothing.

The last figure is of a stream on three nodes that share no folder, with results at an address.

python -m jobs.benchmark jobs
"""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from safetensors.torch import load_file

from cluster.client import Job, all_jobs, connected
from cluster.deepspeed_ops import build_op, extensions_folder
from jobs.benchmark.tools.commands import kill_training_workers, seconds_of, start, until
from jobs.benchmark.tools.nodes_apart import APART, check_namespaces, nodes_apart
from jobs.benchmark.tools.ray_head import ray_head
from jobs.benchmark.tools.s3_server import KEY, SECRET, new_bucket, s3_server
from jobs.benchmark.tools.targets import targets_table
from jobs.endings import user_errors
from jobs.options import DEMO
from jobs.terminal import Terminal
from pipeline.files import user_cache, write_json
from pipeline.learning.run_status import LOCK, status_of
from pipeline.provenance import now, provenance
from pipeline.routing.pool import PoolCard
from pipeline.storage.remote import RemoteFolder

TARGETS = {"seconds_more": 10.0, "runs_of_two": 1.0, "difference": 1e-6, "difference_apart": 1e-6}
"""Most that each figure should be."""

TWO_WORKERS = ("expert.steps=40", "training.workers=2")
"""What the stream on three nodes is changed by, and the one here that it is held against."""

APART_FROM_HEAD = (f"training.label_selector.{APART}=there", "training.placement_strategy=STRICT_SPREAD")
"""Each of the workers on a node of its own, where the driver is not."""


def jobs(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each of the two tasks.", min=20)] = 120,
    output: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs"),
    address: Annotated[
        str | None, typer.Option(help="Job server of a head on this machine; default: one is started.")
    ] = None,
) -> None:
    """Measure what submitting a stream costs, submit it twice at once, and kill terminal, driver and worker.

    Then learn on three nodes without a shared folder, with results at an address.
    """
    with user_errors(), s3_server() as server:
        check_namespaces()
        terminal, started = Terminal(), now()
        folder = (output / "benchmark-jobs").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_op(extensions_folder())  # no part of any figure
        with ExitStack() as stack:
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
        results |= bench.apart(*server)
        write_json(folder / "summary.json", provenance("benchmark-jobs", started) | {"jobs": results})
        terminal.show(targets_table("Submitted jobs", results, TARGETS))
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

    def start(self, name: str, *changes: str, there: bool) -> "subprocess.Popen[str]":
        """Starts the command."""
        return start(self.folder, name, *self._words(name, *changes, there=there))

    def timed(self, name: str, *changes: str, there: bool = False) -> float:
        """Returns the seconds that the command takes."""
        with self.terminal.working(f"{name}: two tasks"):
            return seconds_of(self.folder, name, *self._words(name, *changes, there=there))

    def _words(self, name: str, *changes: str, there: bool) -> list[str]:
        where = ["--address", self.address] if there else []
        return ["learn", "stream.yaml", f"name={name}", f"output={self.folder / 'outputs' / name}", *changes, *where]

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
            workers = kill_training_workers()
            code = last.wait()
        return {
            "attached_after_terminal": attached,
            "exit_code_of_killed_driver": code_of_killed,
            "workers_killed": workers,
            "jobs_of_killed": len(self._jobs("killed")),
            "exit_code_at_last": code,
        }

    def _jobs(self, name: str) -> list[Job]:
        client = connected(self.address)
        return [job for job in all_jobs(client, self.address) if job.metadata.get("run") == name]

    def _run(self, name: str) -> Path:
        return self.folder / "outputs" / name / name

    def _driver(self, name: str) -> int:
        return int(json.loads((self._run(name) / LOCK).read_text())["pid"])

    def _until_training(self, name: str, since: float = 0.0) -> None:
        def trains() -> bool:
            status = status_of(self._run(name)) if self._run(name).exists() else None
            file = self._run(name) / "state" / "status.json"
            return status is not None and " stage " in status.progress and file.stat().st_mtime > since

        until(trains, f"{name} trains")

    def apart(self, server: str, options: str) -> dict[str, Any]:
        """Learns here, then on three nodes that share no folder, with results on a server that speaks S3."""
        alone = self.timed("alone", *TWO_WORKERS)
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        place = f"{new_bucket(server)}/runs{options}"
        changes = [f"output=s3://{place}", f"registry.uri=sqlite:///{self.folder / 'apart.db'}"]
        with nodes_apart((2, 1, 1), [self.folder, user_cache("outputs")], keys) as head:
            self.address = head.address
            apart = self.timed("apart", *TWO_WORKERS, *APART_FROM_HEAD, *changes, there=True)
        RemoteFolder(f"s3://{KEY}:{SECRET}@{place}").download_folder(self.folder / "outputs" / "apart")
        # `content` is of an expert's card, too, which says how long its training took.
        beside: dict[str, Any] = {"store": True, "experts": {"__all__": {"content"}}}
        pools = [PoolCard.read(self._run(name) / "pool").model_dump(exclude=beside) for name in ("alone", "apart")]
        return {
            "seconds_alone": alone,
            "seconds_apart": apart,
            "same_pool_apart": pools[0] == pools[1],
            "difference_apart": self.difference("apart", "alone"),
        }

    def difference(self, name: str, other: str = "direct") -> float:
        """Returns the largest difference between a weight of the experts of this run and of the other one."""
        here, there = (
            sorted((self.folder / "outputs" / run / "experts").rglob("*.safetensors")) for run in (other, name)
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
