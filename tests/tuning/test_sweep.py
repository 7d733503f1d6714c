"""Sweeps on a real Ray Tune: stopped and gone on with, trainings shared, trials that fail or are stopped early."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ray.util import placement_group_table
from typer.testing import CliRunner

from cluster.local import connect
from jobs.cli import app
from jobs.terminal import Terminal
from pipeline.config import LearnConfig
from pipeline.config.loading import load_config
from tests.jobs.test_learn import stream

pytestmark = pytest.mark.ray

SAME = [
    "--task",
    "digits",
    "--validation",
    "0.25",
    "router.kind=two_level",
    "expert.steps=30",
    "expert.validate_every=3",
]
RATES, TEMPERATURES = "expert.learning_rate=2e-3,1e-9", "router.temperature=0.5,2"
GRID = [*SAME, "--set", RATES, "--set", TEMPERATURES, "--scheduler", "asha"]


def sweep(config: Path, *words: str) -> dict[str, Any]:
    """Sweeps to the end; returns the summary that was written last."""
    outcome = CliRunner().invoke(app, ["sweep", str(config), *words])
    assert outcome.exit_code == 0, f"{outcome.output[-4000:]}\n{outcome.exception}"
    file = max((config.parent / "mini" / "sweeps").glob("*/summary.json"), key=lambda found: found.stat().st_mtime)
    return json.loads(file.read_text())


def nested(folder: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [run for run in client.search_runs(["1"]) if "mlflow.parentRunId" in run.data.tags]


def trained(folder: Path) -> set[str]:
    return {file.name for file in (folder / "mini" / "training").glob("digits-*")}


def places() -> int:
    return sum(entry["state"] != "REMOVED" for entry in placement_group_table().values())


@pytest.fixture(scope="module")
def stopped(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a sweep that was stopped when its first trial was done."""
    config = stream(tiny_folder, tmp_path_factory.mktemp("sweep"))
    connect()
    say = Terminal.log

    def log(self: Terminal, text: str, style: str = "") -> None:
        say(self, text, style)
        if "objective" in text:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Terminal, "log", log)
        outcome = CliRunner().invoke(app, ["sweep", str(config), *GRID])
    assert outcome.exit_code == 130, outcome.output[-4000:]
    return config


def test_a_sweep_goes_on_and_has_every_trial_once(stopped: Path) -> None:
    before = places()
    summary = sweep(stopped, *GRID)
    points = [
        (trial["point"]["expert.learning_rate"], trial["point"]["router.temperature"]) for trial in summary["trials"]
    ]
    assert sorted(points) == [(1e-9, 0.5), (1e-9, 2.0), (2e-3, 0.5), (2e-3, 2.0)]
    counts = Counter(trial["status"] for trial in summary["trials"])
    assert counts["done"] >= 2
    assert counts["done"] + counts["stopped"] == 4, "the scheduler may find out too late"
    assert len(trained(stopped.parent)) == 2, "one training per learning rate"
    done = [trial["metrics"] for trial in summary["trials"] if trial["status"] == "done"]
    assert len({metrics["pool"] for metrics in done}) == len(done)
    assert all("held_out" in metrics for metrics in done)
    assert "held-out rows of digits" in summary["selected_on"]
    assert places() <= before
    sweep(stopped, *GRID)
    runs = nested(stopped.parent)
    assert len(runs) == 4, "nothing is written twice"
    assert {run.data.params["expert.learning_rate"] for run in runs} == {"0.002", "1e-09"}
    measured = [set(run.data.metrics) for run in runs if run.info.status == "FINISHED"]
    assert len(measured) == len(done)
    assert all({"objective", "accuracy", "held_out", "abilities", "cost"} <= metrics for metrics in measured)
    (report,) = stopped.parent.glob("mini/sweeps/*/report.html")
    assert "Best of 4 trials" in report.read_text()


def test_what_was_trained_is_not_trained_again_and_a_failed_trial_is_one_row(stopped: Path, tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    words = [*SAME, "--set", "expert.learning_rate=2e-3,1e30", "--register", "--apply", str(best)]
    summary = sweep(stopped, *words)
    assert [trial["status"] for trial in summary["trials"]] == ["done", "failed"]
    assert "task 'digits': the loss is nan" in summary["trials"][1]["error"]
    assert summary["sweep"]["trainings"] == 0, "one was there, the other has failed"
    client = MlflowClient(f"sqlite:///{stopped.parent / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'untrained.expert.digits'")
    assert version.tags["status"].startswith("candidate, ")
    settings = load_config(best, [], LearnConfig)
    assert (settings.expert.learning_rate, settings.stream.tasks[0].validation) == (2e-3, 0.25)
    assert yaml.safe_load(best.read_text())["router"] == {"kind": "two_level"}
    assert (stopped.parent / "experts" / summary["trials"][0]["metrics"]["expert"]).is_dir()


def test_optuna_draws_router_settings_for_which_nothing_is_trained(stopped: Path) -> None:
    pytest.importorskip("optuna", reason="the extra `optuna` is not installed")
    drawn = ["--set", "router.temperature=loguniform:0.1:4", "--search", "optuna", "--trials", "3"]
    summary = sweep(stopped, *SAME, "expert.learning_rate=2e-3", *drawn)
    assert [trial["status"] for trial in summary["trials"]] == ["done"] * 3
    temperatures = {trial["point"]["router.temperature"] for trial in summary["trials"]}
    assert len(temperatures) == 3
    assert all(0.1 <= temperature <= 4 for temperature in temperatures)
    assert summary["sweep"]["trainings"] == 0
