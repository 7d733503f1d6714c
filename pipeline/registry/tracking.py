"""Tracking: MLflow's database or server, and the single run of a job.

The driver opens tracking before any worker starts and is the only process that writes. By default MLflow would make a
database in the current directory of every process, and a new run at every restart.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from time import time
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import mlflow
import requests
import yaml
from alembic.util import CommandError
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import LearnConfig, without_secrets
from pipeline.locks import file_lock
from pipeline.registry.retries import RegistryError, check_server, fail_fast, is_away, is_silent, reason_of

SQLITE = "sqlite:///"

SQLITE_HEADER = b"SQLite format 3\0"
"""First bytes of every SQLite database."""

RUN_TAG = "pointsman.run"
"""Tag of a run: digest of its job. A restarted job finds its run by it."""

_CHATTY = ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "mlflow.tracking.fluent")
"""Loggers that report every table of a new database and every wait for a version at INFO."""

_RESTORE = "restore the file from a copy, or move it away: the next start makes a new one"

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_tracking(uri: str, experiment: str, *, on_wait: Callable[[str], None] = _logger.warning) -> str:
    """Points MLflow at `uri` and returns the id of `experiment`, created on first use (with the database if necessary).

    For a SQLite file the artifacts lie in `mlartifacts/` beside it, by absolute path: the experiment's location is
    stored once and read from any directory. Of several processes one creates the database; the others wait and
    report it to `on_wait`. A server decides about its own artifacts; user and password in its address go into MLflow's own
    environment variables, since MLflow prints the address.

    Raises RegistryError for an invalid address, a server that does not answer, a damaged database or one of a newer MLflow,
    a deleted experiment.
    """
    database = _reach(uri)
    if database is None:
        return _experiment(experiment, None)
    with file_lock(database.with_name(database.name + ".lock"), on_wait=on_wait, why="which prepares the registry"):
        check_database(database)
        try:
            return _experiment(experiment, (database.parent / "mlartifacts").as_uri())
        except SQLAlchemyError as error:
            raise RegistryError(
                f"registry.uri: {database} is damaged, or cannot be written: {reason_of(error)}; {_RESTORE}"
            ) from None
        except (CommandError, MlflowException) as error:
            if isinstance(error, MlflowException) and "database schema" not in str(error):
                raise
            raise RegistryError(
                f"registry.uri: {database} was written by another MLflow than {mlflow.__version__}; back it up and run "
                f"`mlflow db upgrade {SQLITE}{database}` if that one was older, install it if it was newer, or {_RESTORE}"
            ) from None


def _reach(uri: str) -> Path | None:
    """Points MLflow, which from now on reports nothing that nobody asked for, at a server or a file; returns the file."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar per copied file drowns the job's own
    database = database_path(uri)
    if database is not None:
        mlflow.set_tracking_uri(f"{SQLITE}{database}")
        return database
    fail_fast()
    mlflow.set_tracking_uri(_with_credentials_aside(uri))
    check_server()
    return None


def use_registry(uri: str) -> None:
    """Points MLflow at a registry that is there, to look at it; raises RegistryError where there is none."""
    database = _reach(uri)
    if database is None:
        return
    if not database.is_file():
        raise RegistryError(
            f"{database} does not exist: `pointsman learn` makes it in its output folder; name the registry with --registry or "
            "MLFLOW_TRACKING_URI"
        )
    check_database(database)


def check_database(database: Path) -> None:
    """Raises RegistryError for a file that is not a SQLite database; a missing or empty file passes."""
    try:
        with database.open("rb") as file:
            head = file.read(len(SQLITE_HEADER))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RegistryError(f"registry.uri: {database} cannot be read: {error.strerror}; {_RESTORE}") from None
    damaged = bool(head) and head != SQLITE_HEADER
    if not damaged:
        try:  # MLflow would retry a damaged one for minutes
            with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
                opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # such as one that is locked: MLflow's own matter
            return
        except sqlite3.DatabaseError:
            damaged = True
    if damaged:
        raise RegistryError(f"registry.uri: {database} is no SQLite database, or damaged; {_RESTORE}")


def _with_credentials_aside(uri: str) -> str:
    """Returns a server's address without user and password, which MLflow then finds in its environment variables."""
    parts = _server(uri)
    if parts.username:
        password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD")
        if not password:
            raise RegistryError(
                "registry.uri names a user without a password; set MLFLOW_TRACKING_PASSWORD in the environment, or leave "
                "the user out"
            )
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = password
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _server(uri: str) -> SplitResult:
    """Returns the parts of a server's address; raises RegistryError if it names no host, or a port that is none."""
    example = "write it like http://mlflow.example.com:5000"
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # asking for the port checks it
    except ValueError:
        raise RegistryError(f"registry.uri: host or port of {without_secrets(uri)!r} is none; {example}") from None
    if not host:
        raise RegistryError(f"registry.uri: {without_secrets(uri)!r} names no host; {example}")
    return parts


def _experiment(name: str, location: str | None) -> str:
    """Returns the id of an experiment, made on first use."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        experiment = client.get_experiment_by_name(name)  # another process was faster
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise RegistryError(
            f"experiment {name!r} at {without_secrets(mlflow.get_tracking_uri())} is deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` or choose another registry.experiment"
        )
    return experiment.experiment_id


def database_path(uri: str) -> Path | None:
    """Returns the absolute path of a SQLite tracking database; None for a server. Raises RegistryError for the rest."""
    if uri.startswith(SQLITE):
        name = uri.removeprefix(SQLITE)
        if not name or Path(name).is_dir():
            raise RegistryError(
                f"registry.uri: {uri!r} names {'a folder' if name else 'no file'}; "
                f"name the database's file, like {SQLITE}{Path(name) / 'mlflow.db'}"
            )
        return Path(name).resolve()
    if uri.startswith(("http://", "https://")):
        _server(uri)
        return None
    raise RegistryError(
        f"registry.uri: {without_secrets(uri)!r} is neither {SQLITE}<file> nor http(s)://<server>; "
        "MLflow 3 has no other store for this"
    )


LOOPBACK, UI_PORT = "127.0.0.1", 5000
"""Where MLflow's pages are shown by default."""


def ui_command(uri: str, *, host: str = LOOPBACK, port: int = UI_PORT) -> list[str]:
    """Returns the command line that shows a SQLite database in the browser, at http://<host>:<port>.

    Raises RegistryError for a server: its pages are at its own address.
    """
    database = database_path(uri)
    if database is None:
        raise RegistryError(
            f"{without_secrets(uri)} is a server that shows its own pages; open that address in a browser"
        )
    address = ["--host", host, "--port", str(port), "--workers", "1"]
    return ["mlflow", "ui", "--backend-store-uri", f"{SQLITE}{database}", *address]


@contextmanager
def tracked_run(experiment_id: str, name: str, digest: str) -> Iterator[str]:
    """Opens the run of `digest`, after a restart the earlier one, as MLflow's active run; yields its id.

    The run ends as FINISHED, as KILLED if the block was interrupted, or as FAILED if it raises anything else.
    """
    runs = MlflowClient().search_runs(
        [experiment_id], f"tags.`{RUN_TAG}` = '{digest}'", order_by=["attributes.start_time ASC"], max_results=1
    )
    before = mlflow.active_run()
    status = "FAILED"
    try:
        if runs:
            run = mlflow.start_run(run_id=runs[0].info.run_id)
        else:
            run = mlflow.start_run(experiment_id=experiment_id, run_name=name, tags={RUN_TAG: digest})
        yield run.info.run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if mlflow.active_run() is not before:
            _end_run(status)


@contextmanager
def run_beside(version: ModelVersion, name: str) -> Iterator[str]:
    """Opens a run of its own for a change to a version, in that version's experiment; yields its id."""
    experiment = MlflowClient().get_run(version.run_id).info.experiment_id
    with tracked_run(experiment, name, f"{version.name}/{version.version} {name}") as run_id:
        yield run_id


def _end_run(status: str) -> None:
    """Ends MLflow's active run; an unreachable server must not hide a job's own error."""
    if is_silent():
        os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="5")
    try:
        mlflow.end_run(status)
    except (MlflowException, requests.RequestException) as error:
        if not is_away(error):
            raise
        _logger.warning("the registry does not answer: it shows this run as RUNNING until the same command runs again")


def active_run() -> mlflow.ActiveRun:
    """Returns the run that `tracked_run` opened; raises RegistryError outside of one."""
    run = mlflow.active_run()
    if run is None:
        raise RegistryError(
            "no MLflow run is open; register inside `with tracked_run(...)`, so that lineage is recorded"
        )
    return run


COMPARED: dict[str, Any] = {
    "name": True,
    "seed": True,
    "base": {"path", "revision", "dtype", "max_tiles"},
    "data": {"max_tokens", "max_pixels", "group_by_length"},
    "expert": True,
    "router": True,
    "training": True,
    "evaluation": {"limit", "max_new_tokens"},
}
"""The fields of a configuration by which runs are compared: parameters of a run. All are in its artifact `config.yaml`."""


def log_config(run_id: str, config: LearnConfig) -> None:
    """Logs a configuration: what one compares as parameters `group.field`, all of it as `config.yaml`; URIs without their keys.

    Parameters never change in MLflow. A restarted job leaves logged ones as they are: the run's digest covers all that
    affects the result.
    """
    client = MlflowClient()
    present = client.get_run(run_id).data.params
    compared = config.model_dump(mode="json", include=COMPARED)
    compared["stream"] = {"tasks": len(config.stream.tasks), "benchmarks": len(config.stream.benchmarks)}
    params = [Param(key, value) for key, value in flatten(compared) if key not in present]
    for batch in _batches(params, MAX_PARAMS_TAGS_PER_BATCH):
        client.log_batch(run_id, params=batch)
    whole = yaml.safe_dump(_shown(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    client.log_text(run_id, whole, "config.yaml")


def _shown(value: Any) -> Any:
    """Returns nested values with texts that are without secrets."""
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, text) of nested mappings and lists; list items go by their `name`, else by number."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = [
            (item["name"] if isinstance(item, Mapping) and "name" in item else i, item) for i, item in enumerate(value)
        ]
    else:
        yield prefix, without_secrets(str(value))
        return
    for key, item in items:
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


def log_batch(run_id: str, points: Iterable[tuple[str, float, int]]) -> None:
    """Logs (metric, value, step) points in as few calls as MLflow allows."""
    client, now = MlflowClient(), int(time() * 1000)
    metrics = [Metric(key, value, now, step) for key, value, step in points]
    for batch in _batches(metrics, MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def log_dataset(run_id: str, name: str, uri: str, fingerprint: str, *, samples: int, context: str = "training") -> None:
    """Records that the run read `samples` rows of task `name` from `uri`, whose content has this fingerprint.

    MLflow keeps 36 characters of a fingerprint. Logging the same data twice changes nothing.
    """
    scheme = uri.partition("://")[0] if "://" in uri else "local"
    dataset = Dataset(
        name=name,
        digest=fingerprint[:36],
        source_type=scheme,
        source=json.dumps({"uri": without_secrets(uri)}),
        profile=json.dumps({"num_rows": samples}),
    )
    MlflowClient().log_inputs(run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])])
