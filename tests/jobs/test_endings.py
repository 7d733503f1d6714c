"""How jobs end before they are done: mistakes, errors from outside, signals."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from ray.exceptions import RayError
from typer.testing import CliRunner

from jobs.cli import app
from jobs.endings import MOMENT, user_errors
from jobs.terminal import Terminal, methods_table
from pipeline.config import ConfigError
from pipeline.errors import StoredFileError
from pipeline.learning.outside_errors import OutsideError, outside_errors
from pipeline.learning.state import Stopwatch, read_json

SLEEPER = """
import os, signal, time
from jobs.endings import user_errors
with user_errors():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        {cleaning}
"""


@pytest.mark.parametrize(
    ("number", "cleaning", "code"),
    [(signal.SIGINT, "pass", 130), (signal.SIGTERM, "pass", 143), (signal.SIGINT, "time.sleep(60)", 130)],
)
def test_a_signal_unwinds_the_job_and_a_second_ends_it(number: int, cleaning: str, code: int) -> None:
    command = [sys.executable, "-c", SLEEPER.format(cleaning=cleaning)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning up\n"
    if cleaning != "pass":
        process.send_signal(number)  # within a moment it is the same wish
        time.sleep(1.2 * MOMENT)
        assert process.poll() is None
        process.send_signal(number)
    assert process.wait(timeout=30) == code
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with user_errors():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "output"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x"), "/runs/x: No space left .*make room or choose"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), "/runs/x: Permission denied; .*permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/x"), "/runs/x: Read-only.*another `output`"),
        (
            MlflowException("API request failed\nwith a stack"),
            r"MLflow: API request failed; is the registry.s address .registry\.uri, or --registry. right",
        ),
    ],
)
def test_errors_from_outside_are_one_message_with_a_log(tmp_path: Path, error: Exception, output: str) -> None:
    with pytest.raises(OutsideError, match=output) as raised, outside_errors(tmp_path):
        raise error
    assert str(tmp_path / "error.log") in str(raised.value)
    assert "Traceback" in (tmp_path / "error.log").read_text()


def test_a_mistake_that_another_process_met_is_told_as_such(tmp_path: Path) -> None:
    text = "UDF failed\n  File x\npipeline.config.core.ConfigError: base.path: no such base\n\nThe above exception"
    with pytest.raises(OutsideError, match=r"^base\.path: no such base\n    details"), outside_errors(tmp_path):
        raise RayError(text)


def test_a_mistake_of_the_user_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, user_errors():
        raise ConfigError("expert.rank: too large")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: expert.rank: too large\n"


def test_an_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError), user_errors():
        raise AssertionError


def test_methods_without_benchmarks_have_a_dash() -> None:
    metrics = {"new": 0.5, "base_abilities": None, "samples": 3, "seconds": 1.0}
    terminal = Terminal()
    with terminal.console.capture() as shown:
        terminal.console.print(methods_table({"base": metrics}))
    assert " - " in shown.get()


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"'])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "clock.json"
    file.write_text(content)
    for read in (read_json, Stopwatch):
        with pytest.raises(StoredFileError, match=r"clock\.json: damaged.*; delete this file, and the same command"):
            read(file)


DEMO = "jobs/configs/demo.yaml"


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["ui", "--output", "{folder}"], "mlflow.db is no SQLite database"),
        (["pretrain-tiny", "--steps", "1"], "Missing option '--output'"),
        (["pretrain-tiny", "--output", "{folder}/base", "--start", "{folder}"], "holds no pretraining.json"),
        (["plan", "{file}"], "not valid YAML"),
        (["plan", DEMO, "--base-config", "{file}"], "not valid JSON"),
        (["plan", DEMO, "--output", "{file}"], "File exists; something else has that name"),
        (["learn", DEMO, "output={file}"], "a file stands where a folder is needed"),
        (["learn", DEMO, "output=/proc/nothing"], "/proc/nothing"),
    ],
)
def test_a_wrong_input_is_a_message(tmp_path: Path, words: list[str], output: str) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"\x89PNG")
    filled = [word.format(folder=tmp_path, file=tmp_path / "mlflow.db") for word in words]
    outcome = CliRunner().invoke(app, filled)
    assert outcome.exit_code == 2, outcome.output
    assert output in outcome.output
