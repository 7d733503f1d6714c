"""The registry on real servers: MLflow with users and passwords, and PostgreSQL where one is to be had.

All behave as a file does, to the same JSON; what goes wrong is one line with the address, without password or traceback.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
import torch
from click.testing import Result
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import make_url
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.checkpoints import fingerprint
from pipeline.registry import retries
from pipeline.registry.contents import experts_of
from pipeline.registry.experts import download_expert, find_expert, register_expert
from pipeline.registry.loading import fetched_pool
from pipeline.registry.pools import register_pool
from pipeline.registry.promotion import deciding
from pipeline.registry.retries import RegistryError, Retries, is_away
from pipeline.registry.scores import Score, log_scores
from pipeline.registry.tracking import open_tracking, tracked_run, use_registry
from pipeline.registry.versions import get_version, logged_model
from pipeline.routing import Expert, Pool
from pipeline.routing.features import source_width
from pipeline.routing.null import components
from pipeline.routing.store import null_cache_folder
from tests.registry.conftest import WIDTH, Created, MakeExpert

PASSWORD = "hunter2-hunter2"
POSTGRESQL = "POINTSMAN_TEST_POSTGRESQL"
POOL = "untrained.pool.demo"

Register = Callable[[str], None]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def _in_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(retries, "CHECK_SECONDS", 0.0)
    yield
    mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def register(
    make_expert: MakeExpert,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Register:
    """Registers two pools, of one expert and of two, with statistics of base prompts, in a registry that is opened for it."""
    output = tmp_path_factory.mktemp("output")
    experts = [make_expert("digits", "e1"), make_expert("clock", "e2")]
    folders = [expert.save(output / expert.card.name) for expert in experts]
    null = components(torch.randn(16, source_width(WIDTH), generator=torch.Generator().manual_seed(7)), 2)

    def registered(uri: str) -> None:
        experiment = open_tracking(uri, "pointsman", output=output)
        base, versions = BaseModelConfig(path=str(tiny_folder)), {}
        with tracked_run(experiment, "demo", "run") as run:
            for count, folder in enumerate(folders, start=1):
                version = register_expert("untrained", folder, rows=1000)
                versions[experts[count - 1].card.name] = version
                pool = Pool("untrained", fingerprint(tiny_folder), RouterConfig(), experts[:count], null)
                made = register_pool(pool, base, name="demo", digest=f"p{count}", experts=versions)
                log_scores(run, made, [Score(name, "d", 0.75, 0.25) for name in pool.names])

    return registered


@pytest.fixture(scope="module")
def server(created: Created, tmp_path_factory: pytest.TempPathFactory, register: Register) -> Iterator[str]:
    """Address, with user and password, of an MLflow server that hands on its artifacts; all tests share it."""
    pytest.importorskip("flask_wtf", reason="a server with users takes mlflow[auth]")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copyfile(created.path, folder / "mlflow.db")
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\nadmin_username = admin\n"
        "grant_default_workspace_access = false\nauth_cache_ttl_seconds = 600\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test alone",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://admin:{PASSWORD}@127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not answers(port):
            assert time.monotonic() < until, (folder / "log").read_text()[-2000:]
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.2)
        register(address)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def answers(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=2).ok
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty PostgreSQL database: that of POINTSMAN_TEST_POSTGRESQL, or one of a server of this test."""
    pytest.importorskip("psycopg", reason="PostgreSQL takes psycopg")
    if address := os.environ.get(POSTGRESQL):
        yield address
        return
    if shutil.which("initdb") is None:
        pytest.skip(f"needs PostgreSQL: set {POSTGRESQL} to the address of an empty database, or install its binaries")
    # PostgreSQL does not run as root, and a user of its own does not reach pytest's folders.
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    folder, port = Path(f"/tmp/pointsman-postgresql-{os.getpid()}"), free_port()
    folder.mkdir(mode=0o700)
    if user:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    data, options = str(folder / "data"), f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    run = lambda *words: subprocess.run(words, check=True, capture_output=True, **user)  # noqa: E731
    try:
        run(
            "initdb",
            "-D",
            data,
            "-U",
            "admin",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
            "--pwfile",
            str(folder / "password"),
        )
        run("pg_ctl", "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql://admin:{PASSWORD}@127.0.0.1:{port}/postgres"
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def pointsman(*words: str) -> Result:
    return CliRunner().invoke(app, ["registry", *words])


def read(uri: str, *words: str) -> Any:
    outcome = pointsman(*words, "--json", "--registry", uri)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.output)


def check_all_commands(uri: str, folder: Path) -> None:
    """Runs every command; what they say does not depend on where the registry is."""
    assert [each["model"] for each in read(uri, "list")] == [
        POOL, "untrained.expert.clock", "untrained.expert.digits", "untrained.base",
    ]  # fmt: skip
    assert read(uri, "promote", POOL, "1") == {"model": POOL, "champion": 1, "before": None}
    assert read(uri, "promote", POOL) == {"model": POOL, "champion": 2, "before": 1}
    shown = read(uri, "show", POOL)
    assert (shown["version"], shown["aliases"], shown["scores"][0]["accuracy"]) == (2, ["champion"], 0.75)
    assert shown["experts"] == {"digits": "untrained.expert.digits/1", "clock": "untrained.expert.clock/1"}
    assert read(uri, "show", "untrained.expert.clock")["tags"]["rows"] == "1,000"
    assert read(uri, "diff", f"{POOL}/1", f"{POOL}/2")["added"] == ["clock"]
    assert read(uri, "rollback", POOL) == {"model": POOL, "champion": 1, "before": 2}
    assert read(uri, "promote", POOL, "2")["before"] == 1
    retired = read(uri, "retire", POOL, "clock")
    assert (retired["version"], retired["champion"], read(uri, "show", POOL)["retired"]) == (3, True, ["clock"])
    shutil.rmtree(null_cache_folder(), ignore_errors=True)
    assert len(fetched_pool(f"{POOL}/3").null) == 2
    assert read(uri, "gc", "--older-than", "0") == {"found": [], "deleted": 0}
    assert read(uri, "migrate") == {"moves": [], "dry_run": False}
    assert find_expert("untrained", "digits", "e1") is not None
    assert Expert.load(download_expert("untrained", "digits", "latest", folder / "expert")).card.config_digest == "e1"
    outcome = pointsman("show", "nothing", "--registry", uri)
    assert (outcome.exit_code, len(outcome.output.strip().splitlines())) == (2, 1)


def test_all_commands_on_a_server_with_users(server: str, tmp_path: Path) -> None:
    check_all_commands(server, tmp_path)
    assert PASSWORD not in mlflow.get_tracking_uri()


def test_all_commands_on_postgresql(postgresql: str, register: Register, tmp_path: Path) -> None:
    register(postgresql)
    check_all_commands(postgresql, tmp_path)
    register(postgresql)
    assert len(MlflowClient().search_model_versions(f"name = '{POOL}'")) == 3, "nothing is registered twice"


def test_a_database_keeps_decisions_apart(postgresql: str) -> None:
    mlflow.set_tracking_uri(postgresql)
    order = []

    def later() -> None:
        with deciding("pool"):
            order.append("second")

    with deciding("pool"):
        thread = threading.Thread(target=later)
        thread.start()
        with deciding("another"):
            time.sleep(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_artifacts_that_another_machine_has(postgresql: str, register: Register, tmp_path: Path) -> None:
    """Neither is anything written to a place that the readers do not have, nor does anybody guess what is missing."""
    there, away = tmp_path / "there", tmp_path / "away"
    open_tracking(postgresql, "elsewhere", artifacts=str(there))
    with pytest.raises(
        RegistryError, match=r"registry\.artifacts: experiment 'elsewhere' keeps its artifacts in file:.*there"
    ):
        open_tracking(postgresql, "elsewhere", artifacts=str(away))
    there.rename(away)
    with pytest.raises(RegistryError, match="keeps its artifacts in .*there, which this machine does not have"):
        open_tracking(postgresql, "elsewhere")
    with pytest.raises(RegistryError, match="has 2.. characters, of which databases keep 157"):
        open_tracking(postgresql, "long", artifacts="/" + "x" * 200)
    register(postgresql)
    version = get_version(POOL, 1)
    root = Path(MlflowClient().get_experiment_by_name("pointsman").artifact_location.removeprefix("file://"))
    root.rename(root.with_name("away"))
    try:
        with pytest.raises(RegistryError, match=f"{POOL}/1: its files lie in {root}, which this machine does not have"):
            experts_of(version)
    finally:
        root.with_name("away").rename(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"password": "wrong"}, "does not answer: .*password authentication failed"),
        ({"port": 9}, "does not answer: .*onnection refused"),
        ({"database": "nothing"}, 'does not answer: .*database "nothing" does not exist'),
        ({"database": ""}, "names no database"),
        ({"drivername": "postgresql+asyncpg"}, "names a driver that was never tried"),
        ({"drivername": "postgresql+nothing"}, "names an unknown driver"),
    ],
)
def test_a_wrong_address_of_a_database_is_one_line(postgresql: str, change: dict[str, Any], message: str) -> None:
    uri = make_url(postgresql).set(**change).render_as_string(hide_password=False)
    began = time.monotonic()
    outcome = pointsman("list", "--registry", uri)
    assert time.monotonic() - began < 10
    check_line(outcome, rf"--registry: .*{message}")


def check_line(outcome: Result, message: str) -> None:
    assert outcome.exit_code > 0, outcome.output
    assert len(outcome.output.strip().splitlines()) == 1, outcome.output
    assert PASSWORD not in outcome.output
    assert re.search(message, outcome.output), outcome.output


@contextmanager
def gate(
    target: str, *, requests_left: int, status: int | None, failures: int = 10**6
) -> Iterator[tuple[str, list[str]]]:
    """Hands on so many requests, then answers some with `status`, or not at all; yields its address and what was asked."""
    asked: list[str] = []
    host = target.rpartition("@")[2]

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                assert self.rfile.readline() == b"0\r\n", "only empty files come in chunks"
                self.rfile.readline()
            checks = self.path == "/health"
            if not checks:
                asked.append(self.path)
            if not checks and requests_left < len(asked) <= requests_left + failures:
                if status is not None:
                    self.reply(status, b"<html>no</html>")
                self.close_connection = True
                return
            headers = {key: value for key, value in self.headers.items() if key not in ("Host", "Transfer-Encoding")}
            got = requests.request(self.command, f"http://{host}{self.path}", data=body, headers=headers, timeout=30)
            self.reply(got.status_code, got.content)

        def reply(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://admin:{PASSWORD}@127.0.0.1:{listening.server_port}", asked
        finally:
            listening.shutdown()
            thread.join()


COMMANDS = [
    ["list"], ["show", POOL], ["diff", f"{POOL}/1", f"{POOL}/2"], ["promote", POOL, "1"], ["promote", POOL, "2"],
    ["rollback", POOL], ["retire", POOL, "digits"], ["gc", "--older-than", "0", "--json"], ["migrate"],
]  # fmt: skip

FAILURES = [(words, status) for words in COMMANDS for status in (None, 502)]
FAILURES += [(words, status) for words in COMMANDS[1:4:2] for status in (500, 401, 403)]

SAID = {
    None: "fails: it closed the connection; when it answers again",
    401: "asks for a user and a password",
    403: "does not permit this to this user",
}


@pytest.mark.parametrize(("words", "status"), FAILURES)
def test_a_server_that_fails_in_the_middle_is_one_line(server: str, words: list[str], status: int | None) -> None:
    """After none of its requests, after one, three, seven ..."""
    said = SAID.get(status, f"fails: it answers {status}")
    for left in (0, 1, 3, 7, 15, 31):
        with gate(server, requests_left=left, status=status) as (uri, asked):
            outcome = pointsman(*words, "--registry", uri)
        if len(asked) <= left:
            assert outcome.exit_code == 0, outcome.output
            return
        check_line(outcome, rf"^error: http://127\.0\.0\.1:\d+ {said}")
        assert outcome.exit_code == 1, outcome.output


def test_a_server_that_comes_back_gets_what_is_registered(
    server: str, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failure has cut off is done again, once: versions are not doubled."""
    before = read(server, "list")
    monkeypatch.setattr(retries, "_PAUSES", (0.1,))
    messages: list[str] = []
    for left in (2, 5, 9):
        with gate(server, requests_left=left, status=502, failures=2) as (uri, asked):
            use_registry(uri, "--registry")
            Retries(30, messages.append)(partial(register, uri), "registering")
            assert len(asked) > left + 2
    assert "  registering: the registry does not answer (attempt 1: it answers 502); again in 0 s" in messages[0]
    assert read(server, "list") == before


def test_an_artifact_that_is_gone_is_not_a_server_that_is_away(server: str) -> None:
    use_registry(server, "--registry")
    location = logged_model(get_version(POOL, 1)).artifact_location
    with pytest.raises((MlflowException, OSError)) as error:
        mlflow.artifacts.load_text(f"{location}/nothing.json")
    assert not is_away(error.value), error.value
