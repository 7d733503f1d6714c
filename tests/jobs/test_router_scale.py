"""The prompt router alone among synthetic experts, in small."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.benchmark import router_scale
from jobs.benchmark.app import app
from jobs.benchmark.router_scale import SyntheticTasks, _summed, measure
from pipeline.routing.coarse import coarse_statistics
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.statistics import PromptStatistics


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 24, "BASE_ROWS": 120, "ASKED": 12, "BASE_ASKED": 6, "CHANGES": 2, "PIECE": 7}.items():
        monkeypatch.setattr(router_scale, name, value)


@pytest.mark.parametrize("width", [96, 264])
def test_pools_that_grow_are_measured(width):
    results = measure(width, (4, 20))
    assert list(results) == ["4", "20"]
    for count, figures in results.items():
        assert figures["width"] == width
        assert figures["accuracy"] >= 0.95
        assert figures["base_accuracy"] >= 0.95
        assert figures["bytes"] == int(count) * figures["bytes_per_expert"] >= int(count) * width * (width + 1) * 2
        assert all(figures[f"{what}_seconds"] > 0 for what in ("add", "remove", "solve", "first_decision"))
        assert figures["seconds"] > 0


def test_sums_of_many_at_once_are_those_of_each():
    tasks = SyntheticTasks(264)
    statistics, few = list[PromptStatistics](), list[PromptStatistics]()
    pooled = _summed(tasks, statistics, few, PooledStatistics.of(tasks.null), 10)
    pooled = _summed(tasks, statistics, few, pooled, 16)
    expected = PooledStatistics.of([*tasks.null, *(tasks.statistics(number) for number in range(16))])
    assert pooled.count == expected.count
    for part in ("mean_F", "squares_F", "scatter_FF"):
        torch.testing.assert_close(getattr(pooled, part), getattr(expected, part), rtol=1e-4, atol=1e-3)
    actual, one = few[11], coarse_statistics(tasks.statistics(11))
    torch.testing.assert_close(actual.scatter_FF, one.scatter_FF, rtol=1e-4, atol=1e-3)


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router_scale, "WIDTHS", {"routers": 32, "routers_1536": 48})
    monkeypatch.setattr(router_scale, "EXPERTS", (3, 5))
    result = CliRunner().invoke(app, ["routers", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["routers"]["5"]["width"] == 32
    assert summary["routers_1536"]["3"]["width"] == 48
