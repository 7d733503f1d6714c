import json
import logging
import math

import pytest

from pipeline.json_logs import LOGGERS, are_wanted, use_json_logs
from pipeline.learning.progress import LoggedProgress
from pipeline.training.telemetry import RESTART, Step


@pytest.fixture
def restored():
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(each, each.handlers, each.level, each.propagate) for each in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_lines_say_run_task_stage_and_rank_and_no_key(restored, capsys, monkeypatch) -> None:
    assert not are_wanted()
    monkeypatch.setenv("POINTSMAN_LOG", "json")
    assert are_wanted()
    use_json_logs(run="demo", rank=1)
    LoggedProgress().update(
        [Step("first", "expert", 9, 9, 0.25), Step("first", RESTART, 1, 3, math.nan, "a node is gone")]
    )
    logging.getLogger("pipeline.registry").warning("GET http://me:hunter2@mlflow:5000")
    first, restart, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first | {"run": "demo", "task": "first", "stage": "expert", "rank": 1, "step": 9, "loss": 0.25} == first
    assert restart["message"] == "first: a node is gone; restart 1 of 3, from the last checkpoint"
    assert "loss" not in restart, "JSON has no NaN"
    assert (second["level"], second["message"], second["run"]) == ("WARNING", "GET http://mlflow:5000", "demo")
