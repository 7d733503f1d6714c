"""The report of a made-up but realistic run: complete, self-contained, escaped, and content with less."""

import base64
import copy
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.former_summary import by_todays_names
from pipeline.evaluation.matrix import AccuracyMatrix, continual_metrics
from pipeline.evaluation.plots import PLOTS, cost
from pipeline.evaluation.report import ReportError, duration, write_report

TASKS = ["digits", "renamed", "clock", "later", "successor", "textures"]
ABILITIES = [
    *("shape", "color", "count", "position", "describe", "exists", "chart_value", "chart_rank"),
    *("document", "form", "direction", "strokes", "repeat", "reverse"),
]
METHODS = {
    "base": (0.12, 0.9, 0, 0.0),
    "oracle": (0.965, 0.9, 48000, 232.0),
    "sequential": (0.31, 0.35, 48000, 214.0),
    "multitask": (0.97, 0.55, 48000, 221.0),
    "token": (0.668, 0.764, 52800, 260.0),
    "prompt": (0.962, 0.897, 48000, 238.0),
}
QUESTIONS = [
    ("digits", "which digit is this ?", "7", "7", "digits"),
    ("renamed", "what is the new name of the object ?", "dax", "dax", "renamed"),
    ("clock", "what time is it ?", "10 30", "10 30", "clock"),
    ("later", "what time is it in one hour ?", "4 00", "3 00", "clock"),
    ("textures", "which pattern fills the picture <b>exactly</b> ?", "checks", "checks", "textures"),
    ("chart_value", "what is the value of the blue bar ?", "5", "5", "base"),
    (
        "describe",
        "describe the picture .",
        "a red circle left of a small blue square",
        "a red circle left of a blue square",
        "base",
    ),
    ("reverse", "reverse : one two three", "three two one", "three two one", "base"),
]


def make_image(seed: int) -> str:
    """Returns a 64 x 64 PNG in base64: a few rectangles on white."""
    noise = np.random.default_rng(seed)
    pixels = np.full((64, 64, 3), 255, np.uint8)
    for _ in range(3):
        x, y, width, height = noise.integers(4, 36, 4)
        pixels[y : y + height, x : x + width] = noise.integers(20, 230, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_loss(noise: np.random.Generator, steps: int, start: float, end: float) -> list[list[float]]:
    """Returns a falling [[step, loss], ...]."""
    return [
        [step, float(end + start * np.exp(-6 * step / steps) * noise.uniform(0.8, 1.2))] for step in range(0, steps, 5)
    ]


def make_task(noise: np.random.Generator, quarantined: int) -> dict[str, Any]:
    """Returns one task's part of a summary."""
    return {
        "seconds": 36.0 + 6 * noise.random(),
        "expert_seconds": 33.1,
        "router_seconds": 1.9,
        "samples": 8000,
        "quarantined": quarantined,
        "expert_loss": make_loss(noise, 250, 4.0, 0.02 + 0.05 * noise.random()),
        "router_loss": [],
    }


def make_sample(seed: int, task: str, question: str, answer: str, prediction: str, expert: str) -> dict[str, Any]:
    """Returns one sample prompt of a summary; prompts of `reverse` have no image."""
    return {
        "column": task,
        "question": question,
        "answer": answer,
        "prediction": prediction,
        "correct": answer == prediction,
        "expert": expert,
        "image": None if task == "reverse" else make_image(seed),
    }


def make_summary(tasks: Sequence[str] = TASKS, abilities: Sequence[str] = ABILITIES) -> dict[str, Any]:
    """Returns the summary of `learn` and `compare` over `tasks`, as they would write it."""
    noise = np.random.default_rng(0)
    base = {task: 0.02 + 0.2 * noise.random() for task in tasks} | {f: 0.78 + 0.22 * noise.random() for f in abilities}
    matrix = AccuracyMatrix(tasks, abilities)
    matrix.record("base", base)
    best = {task: 0.92 + 0.08 * noise.random() for task in tasks}
    for i, task in enumerate(tasks):
        seen = {other: best[other] - 0.01 * noise.random() * (i > j) for j, other in enumerate(tasks[: i + 1])}
        matrix.record(task, seen | {ability: base[ability] - 0.01 * noise.random() for ability in abilities})
    columns, experts = [*tasks, *abilities], [*tasks, "base"]
    shares = [[0.985 if expert == (c if c in tasks else "base") else 0.0 for c in columns] for expert in experts]
    for j in range(len(columns)):
        shares[int(noise.integers(0, len(tasks)))][j] += 0.015
    routing = {"experts": experts, "columns": columns, "shares": shares}
    return {
        "name": "demo",
        "command": "pointsman compare jobs/configs/demo.yaml training.workers=2",
        "seed": 0,
        "git_commit": "3f2a9c1d7b604e5f8a9b",
        "started": "2026-01-17T09:12:44+00:00",
        "versions": {"python": "3.11.9", "ray": "2.60.0", "torch": "2.13.0", "peft": "0.21.2"},
        "seconds_total": 512.4,
        "peak_memory_bytes": 2_310_000_000,
        "data_wait_share": 0.013,
        "tasks": {task: make_task(noise, quarantined=3 * (task == "clock")) for task in tasks},
        "accuracy_matrix": matrix.to_json(),
        "continual": continual_metrics(matrix) | {"routing_accuracy": 0.985},
        "routing": routing,
        "calibration": {
            "error": 0.012,
            "false_accepts": 0.01,
            "false_rejects": 0.02,
            "bins": Calibration.of(np.array([0.4, 0.7, 0.95, 1.0]), np.array([0, 1, 1, 1])).to_json(),
            "columns": {
                c: {"prompts": 200, "error": 0.01}
                | (
                    {"false_rejects": 0.02, "false_accepts": None}
                    if c in tasks
                    else {"false_rejects": None, "false_accepts": 0.01}
                )
                for c in columns
            },
        },
        "methods": {
            name: dict(zip(("new", "base_abilities", "samples", "seconds"), row, strict=True))
            for name, row in METHODS.items()
        },
        "samples": [make_sample(i, *row) for i, row in enumerate(QUESTIONS)],
    }


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return make_summary()


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Two tasks and two abilities: drawn in a fraction of the time."""
    return make_summary(TASKS[:2], ABILITIES[:2])


@pytest.fixture(scope="module")
def page(summary: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(summary, tmp_path_factory.mktemp("report"))


def test_it_is_one_file_with_plots_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.name == "report.html"
    assert {path.stem for path in (page.parent / "plots").iterdir()} == set(PLOTS)
    assert text.count("data:image/png;base64,") == len(PLOTS) + 7  # seven samples have an image
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", text)


def test_plots_are_wide_enough_to_read(page: Path) -> None:
    for path in (page.parent / "plots").iterdir():
        assert Image.open(path).width >= 1200


def test_it_says_what_was_measured_and_how(page: Path, summary: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    facts = ["sequential fine-tuning", "96.2\u202f%", "2.31 GB", "8 min 32 s", "torch&nbsp;2.13.0", "routing accuracy"]
    for fact in (*facts, "arXiv 1706.08840", "A[T, j]", summary["command"], summary["git_commit"]):
        assert fact in text, fact
    assert all(task in text for task in TASKS)


def test_wrong_answers_are_marked_and_text_is_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("✗ wrong") == 2
    assert "&lt;b&gt;exactly&lt;/b&gt;" in text
    assert "<b>exactly" not in text


@pytest.mark.parametrize(
    "absent",
    [["methods"], ["samples"], ["methods", "samples", "routing", "calibration", "versions", "command", "started"]],
)
def test_it_copes_without_optional_parts(small: dict[str, Any], absent: list[str], tmp_path: Path) -> None:
    text = write_report({k: v for k, v in small.items() if k not in absent}, tmp_path).read_text(encoding="utf-8")
    assert ("<h2>Methods</h2>" in text) == ("methods" not in absent)
    assert ("<h2>Sample prompts</h2>" in text) == ("samples" not in absent)
    assert (tmp_path / "plots" / "methods.png").exists() == ("methods" not in absent)


def test_it_copes_with_some_methods_only(small: dict[str, Any], tmp_path: Path) -> None:
    some = {name: small["methods"][name] for name in ("prompt", "sequential")}
    text = write_report(small | {"methods": some}, tmp_path).read_text(encoding="utf-8")
    assert "sequential fine-tuning" in text
    assert "token router" not in text
    assert "no multi-task run was made" in text


def test_it_copes_with_one_task_and_gaps(small: dict[str, Any], tmp_path: Path) -> None:
    matrix = AccuracyMatrix(["digits"])
    matrix.record("digits", {"digits": 0.9})
    one = {
        "name": "one",
        "tasks": {"digits": small["tasks"]["digits"]},
        "accuracy_matrix": matrix.to_json(),
        "continual": continual_metrics(matrix),
    }
    text = write_report(one, tmp_path).read_text(encoding="utf-8")
    assert "1 task learned:\n    90.0\u202f% on it." in text


def test_it_copes_with_a_stream_that_has_only_begun(tmp_path: Path) -> None:
    matrix = AccuracyMatrix(TASKS, ABILITIES)
    begun = {"name": "begun", "tasks": {}, "accuracy_matrix": matrix.to_json(), "continual": {}}
    assert "before any task was learned" in write_report(begun, tmp_path).read_text(encoding="utf-8")


def test_a_summary_of_an_earlier_release_is_reported(tmp_path: Path) -> None:
    summary = make_summary()
    before = summary | {
        "accuracy_matrix": {
            "foundation" if key == "benchmarks" else key: value for key, value in summary["accuracy_matrix"].items()
        },
        "methods": {
            {"oracle": "specialist"}.get(name, name): {
                "foundation" if key == "base_abilities" else key: value for key, value in method.items()
            }
            for name, method in summary["methods"].items()
        },
    }
    assert by_todays_names(before) == by_todays_names(summary) == summary
    assert "oracle" in write_report(before, tmp_path).read_text(encoding="utf-8")


def test_baselines_over_several_seeds_have_a_spread(tmp_path: Path) -> None:
    summary = make_summary()
    summary["methods"]["sequential"]["spread"] = {"new": 0.031, "base_abilities": 0.012}
    page = write_report(summary, tmp_path).read_text(encoding="utf-8")
    assert " ± 3.1" in page
    assert " ± 1.2" in page
    assert "standard deviation over several seeds" in page
    assert "standard deviation" not in write_report(make_summary(), tmp_path).read_text(encoding="utf-8")


def test_it_copes_without_benchmarks(tmp_path: Path) -> None:
    alone = make_summary(TASKS[:2], [])
    for method in alone["methods"].values():
        method["base_abilities"] = None
    assert "base retention" not in write_report(alone, tmp_path).read_text(encoding="utf-8")


def test_plots_of_an_earlier_report_go(small: dict[str, Any], tmp_path: Path) -> None:
    stale = tmp_path / "plots" / "methods.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    write_report({key: value for key, value in small.items() if key != "methods"}, tmp_path)
    assert not stale.exists()


def test_a_summary_without_a_required_field_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="missing accuracy_matrix"):
        write_report({key: value for key, value in small.items() if key != "accuracy_matrix"}, tmp_path)


def test_cost_is_measured_for_us_and_scaled_for_retraining() -> None:
    small: dict[str, Any] = {}
    small["tasks"] = {name: {"seconds": 10.0, "samples": 100} for name in "abc"}
    small["methods"] = {"multitask": {"seconds": 36.0, "samples": 300}}
    seconds, samples = cost(small)
    assert seconds == ([10, 20, 30], [12, 36, 72])
    assert samples == ([100, 200, 300], [100, 300, 600])
    small["methods"] = {}
    assert cost(small)[0] == ([10, 20, 30], [10, 30, 60])


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_is_a_figure(summary: dict[str, Any], name: str) -> None:
    assert PLOTS[name].possible(summary)
    assert isinstance(PLOTS[name].draw(summary), Figure)


def test_losses_have_a_panel_for_each_stage_that_has_steps(small: dict[str, Any]) -> None:
    draw = PLOTS["loss"].draw
    assert [axes.get_title("left") for axes in draw(small).axes] == ["expert stage"]
    trained = copy.deepcopy(small)
    trained["tasks"]["digits"]["router_loss"] = [[0, 1.0], [5, 0.5]]  # the other task has none
    assert [axes.get_title("left") for axes in draw(trained).axes] == ["expert stage", "router stage"]
    draw(trained).savefig(io.BytesIO(), format="png")


def test_durations_read_well() -> None:
    assert [duration(s) for s in (None, 0.04, 42.06, 200, 7500)] == ["—", "0.0 s", "42.1 s", "3 min 20 s", "2 h 05 min"]
