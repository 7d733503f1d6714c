"""Sweeps on a real Ray Tune: killed and gone on with, trainings shared, trials that fail and that are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from pipeline.config import LearnConfig
from pipeline.config.loading import load_config
from tests.jobs.test_learn import ROOT, stream

pytestmark = pytest.mark.ray

GRID = ["--task", "digits", "--set", "expert.rank=2,4", "--set", "router.temperature=0.5,2", "router.kind=two_level"]


def begin(config: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "jobs.sweep", str(config), *words]
    log = (config.parent / "log.txt").open("w")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def sweep(config: Path, *words: str) -> tuple[dict[str, Any], str]:
    """Sweeps to the end; returns the summary that was written last, and what was printed."""
    process = begin(config, *words)
    code, printed = process.wait(timeout=300), (config.parent / "log.txt").read_text()
    assert code == 0, printed[-4000:]
    file = max((config.parent / "mini" / "sweeps").glob("*/summary.json"), key=lambda found: found.stat().st_mtime)
    return json.loads(file.read_text()), printed


def nested(folder: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [run for run in client.search_runs(["1"]) if "mlflow.parentRunId" in run.data.tags]


def written(folder: Path) -> set[str]:
    return {file.name for file in (folder / "mini" / "training").glob("digits-*")}


@pytest.fixture(scope="module")
def swept(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A sweep whose driver was killed when its first trial was done; its configuration, and the summary of the second call."""
    folder = tmp_path_factory.mktemp("sweep")
    config = stream(tiny_folder, folder)
    process = begin(config, *GRID)
    deadline = time.monotonic() + 200
    while "objective" not in (config.parent / "log.txt").read_text():
        assert time.monotonic() < deadline, (config.parent / "log.txt").read_text()
        assert process.poll() is None, (config.parent / "log.txt").read_text()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    summary, _ = sweep(config, *GRID)
    return config, summary


def test_every_trial_is_there_once_after_a_kill(swept: tuple[Path, dict[str, Any]]) -> None:
    config, summary = swept
    points = sorted((t["point"]["expert.rank"], t["point"]["router.temperature"]) for t in summary["trials"])
    assert points == [(2, 0.5), (2, 2.0), (4, 0.5), (4, 2.0)]
    assert {trial["status"] for trial in summary["trials"]} == {"done"}
    assert len(written(config.parent)) == 2, "one training per rank"
    assert len({trial["metrics"]["pool"] for trial in summary["trials"]}) == 4
    runs = nested(config.parent)
    assert len(runs) == 4
    assert {run.data.params["expert.rank"] for run in runs} == {"2", "4"}
    assert all({"objective", "accuracy", "abilities", "cost"} <= set(run.data.metrics) for run in runs)
    (report,) = config.parent.glob("mini/sweeps/*/report.html")
    assert "Best of 4 trials" in report.read_text()


def test_what_was_trained_is_not_trained_again(swept: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The stream's own expert is one of them; another sweep trains what is new, and what fails is one row."""
    config, _ = swept
    before, best = written(config.parent), tmp_path / "best.yaml"
    words = [
        "--task",
        "digits",
        "--set",
        "expert.rank=4",
        "--set",
        "expert.learning_rate=2e-3,1e30",
        "router.kind=two_level",
    ]
    summary, printed = sweep(config, *words, "--apply", str(best), "--register")
    assert [trial["status"] for trial in summary["trials"]] == ["done", "failed"]
    assert "task 'digits'" in summary["trials"][1]["error"]
    assert "failed" in printed
    assert summary["sweep"]["trainings"] == 0, "rank 4 was there, the other failed"
    assert len(written(config.parent) - before) == 1
    expert = summary["trials"][0]["metrics"]["expert"]
    client = MlflowClient(f"sqlite:///{config.parent / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'untrained.expert.digits'")
    assert version.tags["status"].startswith("candidate, ")
    settings = load_config(best, [], LearnConfig)
    assert (settings.expert.rank, settings.router.kind) == (4, "two_level")
    assert yaml.safe_load(best.read_text())["router"] == {"kind": "two_level"}
    assert (config.parent / "experts" / expert).is_dir()


def test_trainings_that_are_worse_are_stopped(swept: tuple[Path, dict[str, Any]]) -> None:
    config, _ = swept
    rates = "--set=expert.learning_rate=2e-3,1e-9,2e-9,3e-9,4e-9"
    words = ["--task", "digits", rates, "--scheduler", "asha", "--validation", "0.25"]
    steps = ["expert.steps=400", "expert.validate_every=10", "expert.rank=4"]
    summary, _ = sweep(config, *words, *steps)
    assert summary["sweep"]["stopped"] + sum(t["status"] == "done" for t in summary["trials"]) == 5
    assert all("held_out" in trial["metrics"] for trial in summary["trials"] if trial["status"] == "done")
    assert "held-out rows of digits" in summary["selected_on"]
