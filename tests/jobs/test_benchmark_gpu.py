"""The measurement of a GPU: skipped without one, and the same code on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.benchmark.app import app

pytestmark = pytest.mark.ray


def test_it_is_skipped_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = CliRunner().invoke(app, ["gpu", "--output", str(tmp_path)])
    assert outcome.exit_code == 0
    assert outcome.output.startswith("skipped: ")
    assert outcome.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_whole_job_is_measured_beside_its_plan(tmp_path: Path) -> None:
    options = ["gpu", "--size", "tiny", "--device", "cpu", "--steps", "2", "--output", str(tmp_path)]
    outcome = CliRunner().invoke(app, options)
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["moments"]) == ["image features", "base prompts", "both stages", "evaluation"]
    assert all(moment["planned_bytes"] > 0 for moment in summary["moments"].values())
    assert summary["tokens_per_second"] > 0
    assert summary["routed_ratio"] > 0
    assert "| both stages |" in (tmp_path / "report.md").read_text()
