"""Tracking: MLflow's database or server, and the single run of a job.

The driver opens tracking before any worker starts and is the only process that writes. By default MLflow would make a
database in the current directory of every process, and a new run at every restart.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any, TypeVar

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
from pipeline.registry.addresses import RESTORE, SQLITE, check_sqlite, database_path, with_credentials_aside
from pipeline.registry.artifacts import ARTIFACTS, absolute, check_length, check_reached, make_experiment
from pipeline.registry.databases import blurring_collation, database_lock, is_database
from pipeline.registry.retries import (
    REGISTRY_URI,
    RegistryError,
    check_answers,
    fail_fast,
    is_away,
    is_silent,
    reason_of,
    shown_uri,
)

RUN_TAG = "pointsman.run"
"""Tag of a run: digest of its job. A restarted job finds its run by it."""

_CHATTY = ("alembic", "mlflow.store.model_registry.abstract_store", "mlflow.tracking.fluent")
"""Loggers that report every table of a new database and every wait for a version at INFO."""

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_tracking(
    uri: str,
    experiment: str,
    *,
    artifacts: str | None = None,
    output: str | Path = ".",
    on_wait: Callable[[str], None] = _logger.warning,
) -> str:
    """Points MLflow at `uri` and returns the id of `experiment`, created on first use (with the database if necessary).

    A new experiment keeps its artifacts in `artifacts`, a folder or an address; by default in `mlartifacts/` beside a SQLite
    file, or, where the registry is another database, in `output`, a folder or an address. The location is absolute and stored
    once; a server decides about its own. Of several processes one creates the database; the others wait and tell `on_wait`.
    User and password in a server's address go into MLflow's own environment variables, since MLflow prints the address.

    Raises RegistryError for an invalid address, a damaged database or one of another MLflow, a deleted experiment, artifacts
    that this machine does not reach; RegistryFailedError for a server or a database that does not answer.
    """
    database = _reach(uri)
    if database is None and not is_database(uri):
        return _experiment(experiment, artifacts and absolute(artifacts), artifacts)
    if database is None:
        if (collation := blurring_collation(uri)) is not None:
            raise RegistryError(
                f"{REGISTRY_URI}: {shown_uri()} has collation {collation}, which loses characters of descriptions or takes one "
                "name for another; make the database with CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
            )
        prepares, beside, remedy = database_lock(uri, "mlflow", on_wait=on_wait), str(output), "have it restored"
    else:
        file = database.with_name(database.name + ".lock")
        prepares = file_lock(file, on_wait=on_wait, why="which prepares the registry")
        beside, remedy = str(database.parent), RESTORE
    with prepares:
        if database is not None:
            check_sqlite(database)
        try:
            location = absolute(artifacts or f"{beside.rstrip('/')}/{ARTIFACTS}")
            if database is None:
                check_length(location)
            identity = _experiment(experiment, location, artifacts)
            if database is None:
                check_reached(MlflowClient().get_experiment(identity))
            return identity
        except SQLAlchemyError as error:
            raise RegistryError(
                f"{REGISTRY_URI}: {database or shown_uri()} is damaged, or cannot be written: {reason_of(error)}; {remedy}"
            ) from None
        except (CommandError, MlflowException) as error:
            if isinstance(error, MlflowException) and "database schema" not in str(error):
                raise
            raise RegistryError(_other_mlflow(REGISTRY_URI, remedy)) from None


def _other_mlflow(setting: str, remedy: str) -> str:
    return (
        f"{setting}: {shown_uri()} was written by another MLflow than {mlflow.__version__}; back it up and run "
        f"`mlflow db upgrade {shown_uri()}` if that one was older, install it if it was newer, or {remedy}"
    )


def _reach(uri: str, setting: str = REGISTRY_URI) -> Path | None:
    """Points MLflow, which from now on reports nothing that nobody asked for, at a registry; returns its file, if it is one."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised as well
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar per copied file drowns the job's own
    database = database_path(uri, setting)
    if database is not None:
        mlflow.set_tracking_uri(f"{SQLITE}{database}")
        return database
    if is_database(uri):
        mlflow.set_tracking_uri(uri)
    else:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where commands print their JSON
        fail_fast()
        mlflow.set_tracking_uri(with_credentials_aside(uri, setting))
    check_answers(setting)
    return None


def use_registry(uri: str, setting: str) -> None:
    """Points MLflow at a registry that is there, to look at it; raises RegistryError where there is none.

    `setting` is where its address was given: an option or an environment variable.
    """
    database = _reach(uri, setting)
    if database is None:
        return
    if not database.is_file():
        raise RegistryError(
            f"{database} does not exist: `pointsman learn` makes it in its output folder; name the registry with --registry or "
            "MLFLOW_TRACKING_URI"
        )
    check_sqlite(database, setting)


def _experiment(name: str, location: str | None, wanted: str | None) -> str:
    """Returns the id of an experiment, made on first use.

    Raises RegistryError for one that is deleted, or that keeps its artifacts elsewhere than `wanted`.
    """
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return make_experiment(name, location)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        experiment = client.get_experiment_by_name(name)  # another process was faster
        assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise RegistryError(
            f"experiment {name!r} at {shown_uri()} is deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` or choose another registry.experiment"
        )
    if wanted is not None and experiment.artifact_location.rstrip("/") != str(location).rstrip("/"):
        raise RegistryError(
            f"registry.artifacts: experiment {name!r} keeps its artifacts in {without_secrets(experiment.artifact_location)} "
            "since it was made; leave registry.artifacts out, or choose another registry.experiment"
        )
    return experiment.experiment_id


@contextmanager
def tracked_run(experiment_id: str, name: str, digest: str, *, system_metrics: bool | None = None) -> Iterator[str]:
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
            run = mlflow.start_run(run_id=runs[0].info.run_id, log_system_metrics=system_metrics)
        else:
            run = mlflow.start_run(
                experiment_id=experiment_id, run_name=name, tags={RUN_TAG: digest}, log_system_metrics=system_metrics
            )
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
