"""What a user gives as part of an address reaches neither terminal, summary, report, log nor another's list of jobs."""

import sys

import pytest

from jobs.endings import user_errors
from jobs.options import DEMO, job_command
from jobs.terminal import Terminal
from pipeline.config import BaseModelConfig, ConfigError, LearnConfig, load_config
from pipeline.evaluation.report import write_report
from pipeline.learning.outside_errors import LOG, OutsideError, outside_errors
from pipeline.provenance import command_line
from tests.evaluation.test_report import ABILITIES, TASKS, make_summary

SECRET = "hunter2"
ADDRESS = f"http://me:{SECRET}@mlflow:5000"


def test_terminal_command_and_report(capsys, monkeypatch, tmp_path) -> None:
    Terminal().log(f"registry   base.pool@champion at {ADDRESS}")
    monkeypatch.setattr(sys, "argv", ["learn", "a.yaml", f"registry.uri={ADDRESS}"])
    assert command_line() == "learn a.yaml registry.uri=http://mlflow:5000"
    earlier = make_summary(TASKS[:2], ABILITIES[:2]) | {"command": f"learn a.yaml registry.uri={ADDRESS}"}
    page = write_report(earlier, tmp_path)
    assert SECRET not in page.read_text()
    assert "http://mlflow:5000" in capsys.readouterr().out


def test_messages_and_logs_of_errors(capsys, tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"registry: {{url: {ADDRESS!r}}}")
    with pytest.raises(SystemExit), user_errors():
        load_config(file, [], LearnConfig)
    with pytest.raises(OutsideError), outside_errors(tmp_path):
        raise OSError(f"GET {ADDRESS}/rows?token={SECRET} failed")
    assert SECRET not in (tmp_path / LOG).read_text()
    assert SECRET not in capsys.readouterr().err


def test_a_submitted_command_may_hold_none() -> None:
    with pytest.raises(ConfigError, match="'http://mlflow:5000': it holds a key.*MLFLOW_TRACKING_URI") as error:
        job_command("jobs.learn", DEMO, [], "http://127.0.0.1:1", "--registry", ADDRESS)
    assert SECRET not in str(error.value)


def test_a_base_is_not_named_by_its_key() -> None:
    assert BaseModelConfig(path=f"s3://bucket/internvl?sig={SECRET}").label == "internvl"
