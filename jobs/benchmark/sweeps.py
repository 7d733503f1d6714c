"""Sweeps: what ranks and temperatures cost beside one training, what stopping early saves, that kills lose no trial.

python -m jobs.benchmark sweeps
"""

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from mlflow import MlflowClient
from ray.util.state import list_placement_groups

from cluster.access import use_token
from cluster.deepspeed_ops import build_op, extensions_folder
from jobs.benchmark.tools.commands import (
    NotSeenError,
    kill_training_workers,
    seconds_of,
    start,
    training_workers,
    until,
)
from jobs.benchmark.tools.ray_head import ray_head
from jobs.benchmark.tools.targets import targets_table
from jobs.endings import user_errors
from jobs.options import DEMO
from jobs.terminal import Terminal
from pipeline.files import write_json
from pipeline.learning.run_status import LOCK
from pipeline.provenance import now, provenance

TARGETS = {"total_to_training": 3.2, "asha_to_grid": 0.5, "score_lost": 0.01, "trials_wrong": 0, "places_left": 0}
"""Most that each figure should be."""

TASK = "later"
"""The demo's last task, which is swept; the pool around it holds the five others."""

RANKS = ("--set", "expert.rank=4,8,12", "--set", "router.temperature=0.2,0.5,1,2,5", "router.kind=two_level")
"""Three trainings, since the demo's own rank is another one, of five temperatures each."""

RATES = ("--set", "expert.rank=4,8,16", "--set", "expert.learning_rate=2.5e-4,1e-3,4e-3,1.6e-2", "--validation", "0.1")
"""Twelve trainings, compared on rows that none has learned."""

TWENTY = ("--set", "expert.rank=2,4,6,8", "--set", "router.temperature=0.2,0.5,1,2,5", "router.kind=two_level")
"""Four trainings in twenty trials."""


def sweeps(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.", min=40)] = 300,
    output: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs"),
) -> None:
    """Measure what ranks and temperatures cost beside one training, a grid with and without stopping early, and kills."""
    with user_errors():
        terminal, started = Terminal(), now()
        folder = (output / "benchmark-sweeps").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_op(extensions_folder())  # no part of any figure
        bench = Bench(folder, steps, terminal)
        results: dict[str, Any] = {"steps": steps, **bench.ranks(), **bench.stopped_early(), **bench.killed()}
        write_json(folder / "summary.json", provenance("benchmark-sweeps", started) | {"sweeps": results})
        terminal.show(targets_table("Sweeps", results, TARGETS))
        terminal.log(f"summary    {folder / 'summary.json'}")


class Bench:
    """Sweeps of one task of the demo, in an output folder per measurement: what one has trained no other finds."""

    def __init__(self, folder: Path, steps: int, terminal: Terminal) -> None:
        self.folder, self.steps, self.terminal = folder, steps, terminal

    def ranks(self) -> dict[str, Any]:
        """Learns the demo, then sweeps ranks and temperatures inside its pool."""
        with self.terminal.working("learning the demo"):
            seconds_of(self.folder, "learn", "learn", *self._config("ranks"))
        swept = self._swept("ranks", *RANKS)
        found = swept["sweep"]
        return {
            "seconds_total": found["seconds_total"],
            "seconds_one_training": found["seconds_one_training"],
            "total_to_training": found["seconds_total"] / found["seconds_one_training"],
        }

    def stopped_early(self) -> dict[str, Any]:
        """Sweeps twelve points, all to their end, then anew with ASHA."""
        early = "--scheduler", "asha", f"expert.validate_every={max(1, self.steps // 10)}"
        grid, asha = self._swept("grid", *RATES), self._swept("asha", *RATES, *early)
        seconds = {name: found["sweep"]["seconds_total"] for name, found in (("grid", grid), ("asha", asha))}
        return {
            "seconds_grid": seconds["grid"],
            "seconds_asha": seconds["asha"],
            "stopped": asha["sweep"]["stopped"],
            "asha_to_grid": seconds["asha"] / seconds["grid"],
            "winner_of_grid": _best(grid)["point"],
            "winner_of_asha": _best(asha)["point"],
            "score_lost": _best(grid)["metrics"]["objective"] - _best(asha)["metrics"]["objective"],
        }

    def killed(self) -> dict[str, Any]:
        """Sweeps on a head on this machine, kills the driver, goes on, and kills the workers that train."""
        name = "killed"
        run = self.folder / name / name
        with ray_head() as head, self.terminal.working("twenty trials: killing driver and workers"):
            words = [*self._words(name, *TWENTY, "evaluation.limit=50"), "--address", head.address]
            first = start(self.folder, name, *words)
            _until_training(run, first)
            os.kill(int(json.loads((run / LOCK).read_text())["pid"]), signal.SIGKILL)
            code_of_killed = first.wait()
            until(lambda: not training_workers(), "the workers of a killed driver end")
            last = start(self.folder, name, *words)
            _until_training(run, last)
            workers = kill_training_workers()
            code = last.wait()
            use_token()
            left = sum(group.state != "REMOVED" for group in list_placement_groups(address=head.address))
        if code:
            raise NotSeenError(f"the sweep that was killed ended with {code}; see {self.folder}/{name}-*.log")
        counts = Counter(repr(trial["point"]) for trial in _summary(run)["trials"] if trial["status"] == "done")
        client = MlflowClient(f"sqlite:///{self.folder / name / 'mlflow.db'}")
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        nested = [r for r in client.search_runs(experiments) if "mlflow.parentRunId" in r.data.tags]
        return {
            "exit_code_of_killed_driver": code_of_killed,
            "workers_killed": workers,
            "trials_once": sum(count == 1 for count in counts.values()),
            "runs_in_mlflow": len(nested),
            "trials_wrong": abs(20 - sum(count == 1 for count in counts.values())) + abs(20 - len(nested)),
            "places_left": left,
        }

    def _config(self, name: str) -> list[str]:
        return [str(DEMO), f"name={name}", f"output={self.folder / name}", f"expert.steps={self.steps}"]

    def _words(self, name: str, *more: str) -> list[str]:
        return ["sweep", *self._config(name), "--task", TASK, *more]

    def _swept(self, name: str, *more: str) -> dict[str, Any]:
        with self.terminal.working(f"sweep {name}"):
            seconds_of(self.folder, name, *self._words(name, *more))
        found = _summary(self.folder / name / name)
        self.terminal.log(f"  {name}: {found['sweep']['seconds_total']:.0f} s, {found['sweep']['trainings']} trainings")
        return found


def _best(summary: dict[str, Any]) -> dict[str, Any]:
    return next(trial for trial in summary["trials"] if trial["number"] == summary["best"])


def _summary(run: Path) -> dict[str, Any]:
    """Returns the summary of the run's only sweep."""
    (file,) = (run / "sweeps").glob("*/summary.json")
    return dict(json.loads(file.read_text()))


def _until_training(run: Path, command: "subprocess.Popen[str]") -> None:
    """Waits until workers are there and an expert of the run is begun and not finished."""

    def trains() -> bool:
        if command.poll() is not None:
            raise NotSeenError(f"the sweep ended before it trained; see {run.parents[1]}/{run.name}-*.log")
        begun = list((run / "training").glob(f"{TASK}-*"))
        return bool(training_workers()) and any(not (folder / "finished").exists() for folder in begun)

    until(trains, f"{run.name} trains")
