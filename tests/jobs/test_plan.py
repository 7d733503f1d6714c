"""The command as a user types it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.benchmark import memory_estimate
from jobs.benchmark.app import app as benchmarks
from jobs.cli import app

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
STREAM = str(CONFIGS / "internvl2_2b.yaml")
BASE = ("--base-config", str(CONFIGS / "bases" / "internvl2_2b" / "config.json"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *options: CliRunner().invoke(app, ["plan", *options, "--output", str(tmp_path)])


def test_it_says_what_is_needed_and_that_it_fits(run: Any, tmp_path: Path) -> None:
    outcome = run(STREAM, *BASE)
    assert outcome.exit_code == 0, outcome.output
    for words in ("vision tower", "17,301,504", "Memory of each of 4 GPUs (a10g)", "logits and loss", "allowance",
                  "16 = 4 x 4 x 1", "the stream, 2 tasks", "pool of 100", "fits       20.66 of 24.00 GB",
                  "Every moment of the job", "base prompts", "image features", "router stage", "evaluation", "served pool",
                  "no part of this plan was ever run on a GPU",
                  "64 tokens of a typical row, 512 of the longest (--answer-tokens, --longest-answer)"):  # fmt: skip
        assert words in outcome.output, words
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["name"] == "internvl2-2b"
    assert figures["memory"]["fits"] is True
    assert [moment["moment"] for moment in figures["memory"]["job"]][0] == "base prompts"
    assert figures["memory"]["worst_moment"] == "expert stage"
    assert figures["parameters"]["trained"] == 17_301_504
    assert {"command", "seed", "git_commit", "started", "versions", "base"} <= figures.keys()


def test_json_is_the_file(run: Any, tmp_path: Path) -> None:
    outcome = run(STREAM, *BASE, "--json", "--gpu", "h100", "expert.rank=8")
    assert json.loads(outcome.output) == json.loads((tmp_path / "plan.json").read_text())
    assert json.loads(outcome.output)["gpu"]["name"] == "h100"


def test_it_says_what_to_change(run: Any) -> None:
    larger = ["data.vision_cache=off", "training.micro_batch=4", "data.max_tokens=8192"]
    outcome = run(STREAM, *BASE, "--gpu", "a10g", *larger)
    assert outcome.exit_code == 0, outcome.output
    output = [
        line.split("   ")[0] for line in outcome.output.splitlines() if "does not fit" in line or "  then" in line
    ]
    assert output == [
        "does not fit  144.38 of 24.00 GB on a10g (logits and loss)",
        "  then still not: data.vision_cache=features",
        "  then still not: training.micro_batch=1",
        "  then fits: training.gradient_checkpointing=true",
    ]


def test_formulas_come_with_their_sources(run: Any) -> None:
    outcome = run(STREAM, *BASE, "--explain")
    for source in (
        "arXiv 2205.05198",
        "2205.14135",
        "1910.02054",
        "2104.07857",
        "2001.08361",
        "2204.02311",
        "config-json",
    ):
        assert source in " ".join(outcome.output.split()), source


def test_the_demo_is_planned_for_this_machine(run: Any) -> None:
    outcome = run(str(CONFIGS / "demo.yaml"))
    assert outcome.exit_code == 0, outcome.output
    assert "Memory of the worker" in outcome.output
    assert "on this machine" in outcome.output


def test_mistakes_are_one_line(run: Any) -> None:
    mistakes = {
        "--gpu v100: not known; choose one of a10": run(STREAM, *BASE, "--gpu", "v100"),
        "--base-config path/to/config.json": run(STREAM),
        "--answer-tokens 300: --text-tokens 200 includes them": run(STREAM, *BASE, "--answer-tokens", "300"),
    }
    for words, outcome in mistakes.items():
        assert outcome.exit_code == 2, outcome.output
        assert words in outcome.output
        assert outcome.output.startswith("error: ")
        assert outcome.output.count("\n") == 1


def test_the_benchmark_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_estimate, "QUICK", memory_estimate.CASES[:1])
    outcome = CliRunner().invoke(benchmarks, ["plan", "--quick", "--threads", "1", "--output", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["plan"]["max_relative_error"] <= 0.15
    assert {case["part"] for case in summary["cases"]} >= {"frozen weights", "kept for backward", "answers", "peak"}
