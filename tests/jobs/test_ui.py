"""The command that shows MLflow's pages says what is in the way before it starts them."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import ui
from jobs.cli import app
from pipeline.registry import retries
from tests.registry.conftest import Created, created

__all__ = ["created"]


def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, list[str]]:
    """Returns exit code, output and the command that would take the place of this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(ui.os, "execv", lambda path, command: commands.append(command))
    outcome = CliRunner().invoke(app, ["ui", *words])
    return outcome.exit_code, outcome.output, commands[0] if commands else []


def test_pages_are_shown_on_loopback(monkeypatch: pytest.MonkeyPatch, created: Created) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code, output, command = started(monkeypatch, "--output", str(created.path.parent), "--port", port)
    assert code == 0, output
    assert command[2:] == [
        "mlflow", "ui", "--backend-store-uri", f"sqlite:///{created.path}",
        "--host", "127.0.0.1", "--port", port, "--workers", "1",
    ]  # fmt: skip
    _, output, _ = started(monkeypatch, "--registry", f"sqlite:///{created.path}", "--port", port, "--host", "0.0.0.0")
    assert f"whoever reaches 0.0.0.0:{port} can change this registry" in output


def test_what_is_in_the_way_is_one_line(monkeypatch: pytest.MonkeyPatch, created: Created, tmp_path: Path) -> None:
    monkeypatch.setattr(retries, "CHECK_SECONDS", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, message in (
            (["--output", str(tmp_path)], f"{tmp_path}/mlflow.db does not exist: `pointsman learn` makes it"),
            (
                ["--registry", "http://127.0.0.1:9"],
                "--registry: http://127.0.0.1:9 does not answer: connection refused",
            ),
            (["--output", str(created.path.parent), "--port", port], f"127.0.0.1:{port}: Address already in use"),
            (
                ["--output", str(created.path.parent), "--host", "no.such.host.invalid"],
                "choose another --port or --host",
            ),
        ):
            code, output, command = started(monkeypatch, *words)
            assert (code > 0, command) == (True, []), output
            assert message in output
