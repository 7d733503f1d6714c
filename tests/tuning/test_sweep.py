"""Sweeps on a real Ray Tune: stopped and gone on with, trainings shared, trials that fail and that are stopped early."""

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

GRID = ["--task", "digits", "--set", "expert.rank=2,4", "--set", "router.temperature=0.5,2", "router.kind=two_level"]


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
    points = [(trial["point"]["expert.rank"], trial["point"]["router.temperature"]) for trial in summary["trials"]]
    assert sorted(points) == [(2, 0.5), (2, 2.0), (4, 0.5), (4, 2.0)]
    assert Counter(trial["status"] for trial in summary["trials"]) == {"done": 4}
    assert len(trained(stopped.parent)) == 2, "one training per rank"
    assert len({trial["metrics"]["pool"] for trial in summary["trials"]}) == 4
    assert places() <= before
    sweep(stopped, *GRID)
    runs = nested(stopped.parent)
    assert len(runs) == 4, "nothing is written twice"
    assert {run.data.params["expert.rank"] for run in runs} == {"2", "4"}
    assert all({"objective", "accuracy", "abilities", "cost"} <= set(run.data.metrics) for run in runs)
    (report,) = stopped.parent.glob("mini/sweeps/*/report.html")
    assert "Best of 4 trials" in report.read_text()


def test_what_was_trained_is_not_trained_again_and_a_failed_trial_is_one_row(stopped: Path, tmp_path: Path) -> None:
    before, best = trained(stopped.parent), tmp_path / "best.yaml"
    words = ["--task", "digits", "--set", "expert.rank=4", "--set", "expert.learning_rate=2e-3,1e30", "--register"]
    summary = sweep(stopped, *words, "router.kind=two_level", "--apply", str(best))
    assert [trial["status"] for trial in summary["trials"]] == ["done", "failed"]
    assert "task 'digits': the loss is nan" in summary["trials"][1]["error"]
    assert summary["sweep"]["trainings"] == 0, "rank 4 was there, the other has failed"
    assert len(trained(stopped.parent) - before) <= 1
    client = MlflowClient(f"sqlite:///{stopped.parent / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'untrained.expert.digits'")
    assert version.tags["status"].startswith("candidate, ")
    settings = load_config(best, [], LearnConfig)
    assert (settings.expert.rank, settings.router.kind) == (4, "two_level")
    assert yaml.safe_load(best.read_text())["router"] == {"kind": "two_level"}
    assert (stopped.parent / "experts" / summary["trials"][0]["metrics"]["expert"]).is_dir()


def test_trials_are_compared_and_stopped_by_held_out_rows(stopped: Path) -> None:
    rates = "expert.learning_rate=2e-3,1e-9,2e-9,3e-9"
    words = ["--task", "digits", "--set", rates, "--scheduler", "asha", "--validation", "0.25"]
    summary = sweep(stopped, *words, "expert.steps=60", "expert.validate_every=5", "expert.rank=4")
    counts = Counter(trial["status"] for trial in summary["trials"])
    assert counts["done"] >= 1
    assert counts["done"] + counts["stopped"] == 4
    assert all("held_out" in trial["metrics"] for trial in summary["trials"] if trial["status"] == "done")
    assert "held-out rows of digits" in summary["selected_on"]
