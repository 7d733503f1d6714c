"""The sweep on a real Ray Tune: one training per rank, evaluations for the rest, nested runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.jobs.test_learn import ROOT, stream

pytestmark = pytest.mark.ray


def test_sweep_trains_once_a_rank(tiny_folder: Path, tmp_path: Path) -> None:
    config = stream(tiny_folder, tmp_path)
    command = [sys.executable, "-m", "jobs.sweep", str(config), "--task", "digits", "--ranks", "2,4"]
    command += ["--temperatures", "0.5,1,2"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-3000:]
    assert "temperature has no effect" in answer.stdout
    (file,) = (tmp_path / "mini" / "sweeps").glob("*/summary.json")
    summary = json.loads(file.read_text())
    assert set(summary["training_seconds"]) == {"2", "4"}
    assert {(t["rank"], t["temperature"]) for t in summary["trials"]} == {
        (r, t) for r in (2, 4) for t in (0.5, 1.0, 2.0)
    }
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs(["1"])
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(nested) == 6
    assert len(runs) == 7


def test_a_task_that_is_not_there_is_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.sweep", str(stream(tiny_folder, tmp_path)), "--task", "nope"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert answer.returncode == 2
    assert "there are: digits, echo" in answer.stderr
