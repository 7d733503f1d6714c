"""A registry that goes away and comes back: a small HTTP server in its place, which refuses connections in between."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.registry import metric_buffer, retries
from pipeline.registry.failures import registry_failures
from pipeline.registry.metric_buffer import MetricBuffer
from pipeline.registry.retries import RegistryError, RegistryFailedError, Retries, check_answers
from pipeline.registry.tracking import tracked_run


@pytest.fixture
def port() -> Iterator[int]:
    """A free port that MLflow is pointed at; nobody listens there yet."""
    before = mlflow.get_tracking_uri()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    mlflow.set_tracking_uri(f"http://127.0.0.1:{number}")
    yield number
    mlflow.set_tracking_uri(before)


@pytest.fixture(autouse=True)
def _in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(retries, "_PAUSES", (0.2,))
    monkeypatch.setattr(retries, "CHECK_SECONDS", 0.5)
    monkeypatch.setattr(metric_buffer, "PAUSE_SECONDS", 0.0)


@contextmanager
def server(port: int, received: list[dict[str, Any]], status: int = 200) -> Iterator[None]:
    """Answers every request with `status`, keeping what is posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._answer()

        def _answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}" if status == 200 else b"no")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            listening.shutdown()
            thread.join()


def values(received: list[dict[str, Any]]) -> list[float]:
    return [metric["value"] for batch in received for metric in batch["metrics"]]


def test_a_server_that_is_away_at_the_start_is_a_clear_error(port: int) -> None:
    began = time.monotonic()
    with pytest.raises(RegistryError, match=rf"registry\.uri: http://127.0.0.1:{port} does not answer: .*start that"):
        check_answers()
    assert time.monotonic() - began < 5
    with server(port, [], status=503), pytest.raises(RegistryError, match="it answers 503"):
        check_answers()
    with server(port, [], status=401):
        check_answers()  # it is there, and asks for a password


def test_metrics_wait_in_a_file_until_the_server_is_back(port: int, tmp_path: Path) -> None:
    messages: list[str] = []
    received: list[dict[str, Any]] = []
    metrics = MetricBuffer(tmp_path / "state" / "metrics.jsonl", messages.append)
    metrics.log("run", [("loss", 1.0, 1)])
    metrics.log("run", [("loss", 0.5, 2)])
    assert metrics.waiting == 2
    assert len(messages) == 1, "said once"
    with (tmp_path / "state" / "metrics.jsonl").open("a") as file:
        file.write('\n["run", "lo')  # killed while it wrote
    later = MetricBuffer(tmp_path / "state" / "metrics.jsonl", messages.append)
    later.log("run", [("loss", 0.25, 3)])
    with server(port, received):
        assert later.write()
    assert values(received) == [1.0, 0.5, 0.25]
    assert [batch["run_id"] for batch in received] == ["run"]
    assert messages[-1].endswith("the registry answers again: 3 points of metrics written")
    assert MetricBuffer(tmp_path / "state" / "metrics.jsonl", messages.append).waiting == 0


def test_a_point_that_is_written_twice_is_there_once(experiment: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with tracked_run(experiment, "demo", "abc") as run:
        lines = "".join(json.dumps([key, "loss", 0.5, 1, 1000]) + "\n" for key in (run, run, "0" * 32))
        messages: list[str] = []
        for _ in range(2):
            file.write_text(lines)
            assert MetricBuffer(file, messages.append).write()
        assert len(MlflowClient().get_metric_history(run, "loss")) == 1
    assert "metrics of run 00000000000000000000000000000000 are refused" in messages[0]


def test_a_process_that_goes_on_writes_what_is_missing_and_nothing_twice(experiment: str, tmp_path: Path) -> None:
    with tracked_run(experiment, "demo", "holes") as run:
        first = MetricBuffer(tmp_path / "metrics.jsonl", print)
        first.log(run, [("loss", 0.5, 1), ("loss", 0.25, 4), ("loss", 0.5, 1)])
        later = MetricBuffer(tmp_path / "metrics.jsonl", print)
        later.go_on(run)
        later.log(run, [("loss", 0.5, 1), ("loss", 0.4, 2), ("loss", 0.3, 3)])
        later.log(run, [("loss", 0.3, 3), ("loss", 0.25, 4), ("loss", 0.2, 5), ("other", 1.0, 0)])
        history = MlflowClient().get_metric_history(run, "loss")
        assert sorted((point.step, point.value) for point in history) == [
            (1, 0.5), (2, 0.4), (3, 0.3), (4, 0.25), (5, 0.2),
        ]  # fmt: skip


def test_what_is_registered_is_tried_until_the_server_is_back(port: int) -> None:
    messages: list[str] = []
    received: list[dict[str, Any]] = []

    def later() -> None:
        time.sleep(0.7)
        with server(port, received):
            time.sleep(2)

    thread = threading.Thread(target=later)
    thread.start()
    Retries(20, messages.append)(lambda: MlflowClient().log_metric("run", "loss", 1.0), "registering expert digits")
    thread.join()
    assert len(received) == 1
    assert messages[0].startswith("  registering expert digits: the registry does not answer (attempt 1: ")
    assert "attempt 2" in messages[1]


def test_the_last_retry_says_what_is_safe(port: int) -> None:
    with pytest.raises(RegistryError, match=r"registering expert digits: .* did not answer \d times in ") as error:
        Retries(0.5, lambda text: None)(refuse, "registering expert digits", kept="the trained expert is in /runs/x")
    assert "the trained expert is in /runs/x" in str(error.value)
    assert "run the same command again" in str(error.value)


def test_a_mistake_is_not_repeated(experiment: str) -> None:
    action: Callable[[], Any] = lambda: MlflowClient().get_run("0" * 32)  # noqa: E731
    with pytest.raises(MlflowException, match="not found"):
        Retries(20, pytest.fail)(action, "reading a run")


def refuse() -> None:
    raise AssertionError("never called: nobody answers")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "asks for a user and a password"),
        (403, "does not permit this to this user"),
        (500, "fails: it answers 500; when it answers again"),
        (502, "fails: it answers 502; when it answers again"),
    ],
)
def test_what_a_server_answers_is_said_with_its_address(port: int, status: int, said: str) -> None:
    with server(port, [], status), pytest.raises(RegistryFailedError, match=said) as error, registry_failures():
        MlflowClient().search_experiments()
    assert str(error.value).startswith(f"http://127.0.0.1:{port} ")
    assert error.value.exit_code == 1


def test_what_another_server_answers_is_not_the_registrys_failure(port: int) -> None:
    with pytest.raises(requests.ConnectionError), registry_failures():
        requests.get("http://127.0.0.1:9/weights", timeout=1)
