"""Versions of registered models for experts, pools and bases: found by tags, finished or not.

Order of writing: artifacts, version with its tags, alias, `finished`. A process killed in between leaves a version without
that last tag. It does not count as finished, and the next registration with the same digest removes it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.registry.retries import RegistryError

DIGEST, FINISHED = "config_digest", "finished"
"""Tags of a version: digest of configuration, data and base; and whether it is complete."""

MODELS = "models:/"
"""Scheme of the address of a logged model, and of a registered one."""

SETTLING_SECONDS = 10.0
"""Seconds that a version may lack its last tag before its process counts as killed: two calls lie in between."""

_PAGE = 1000


def find_finished(name: str, digest: str) -> ModelVersion | None:
    """Returns the newest finished version of registered model `name` made from `digest`, or None."""
    finished = [version for version in _with_digest(name, digest) if version.tags.get(FINISHED) == "true"]
    return max(finished, key=_number, default=None)


def _with_digest(name: str, digest: str) -> list[ModelVersion]:
    return MlflowClient().search_model_versions(f"name = '{name}' and tags.{DIGEST} = '{digest}'", max_results=_PAGE)


def _number(version: ModelVersion) -> int:
    return int(version.version)  # a number from a database, a text from a server


def get_version(name: str, version_or_alias: int | str) -> ModelVersion:
    """Returns a finished version by number or alias; raises RegistryError that lists the available ones."""
    client, wanted = MlflowClient(), str(version_or_alias)
    try:
        if wanted.isdigit():
            version = client.get_model_version(name, wanted)
        else:
            version = client.get_model_version_by_alias(name, wanted)
    except MlflowException as error:
        # MLflow says "invalid parameter" where an alias does not exist, "does not exist" for all else.
        if error.error_code not in {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), "INVALID_PARAMETER_VALUE"}:
            raise
        raise RegistryError(f"no {wanted!r} in {name!r}; {_inventory(client, name)}") from None
    if version.tags.get(FINISHED) != "true":
        raise RegistryError(f"version {version.version} of {name!r} was never finished; register it again")
    return version


def _inventory(client: MlflowClient, name: str) -> str:
    models = client.search_registered_models(f"name = '{name}'")
    if not models:
        return "nothing is registered under that name yet"
    versions = client.search_model_versions(f"name = '{name}'", max_results=_PAGE)
    numbers = ", ".join(map(str, sorted(_number(v) for v in versions if v.tags.get(FINISHED) == "true")))
    aliases = ", ".join(f"{alias} = {number}" for alias, number in sorted(models[0].aliases.items()))
    return f"there are versions {numbers or '(none)'} and aliases {aliases or '(none)'}"


def create_version(
    name: str, model_id: str, run_id: str, tags: Mapping[str, object], *, alias: str, about: str
) -> ModelVersion:
    """Makes the logged model `model_id` the next version of `name`, moves `alias` to it and marks it finished.

    `tags` must hold `config_digest`; `about` describes the registered model when it is created. If another process has
    registered the same digest meanwhile, its version is returned and no alias moves.
    """
    assert DIGEST in tags, "a version is found again by its digest"
    client = MlflowClient()
    _ensure_model(name, about)
    texts = {key: str(value) for key, value in tags.items()}
    version = client.create_model_version(name, f"{MODELS}{model_id}", run_id, tags=texts, model_id=model_id)
    if (other := _earlier(version, texts[DIGEST])) is not None:
        client.delete_model_version(name, version.version)
        return other
    client.set_registered_model_alias(name, alias, version.version)
    client.set_model_version_tag(name, version.version, FINISHED, "true")
    return get_version(name, version.version)


def _ensure_model(name: str, about: str) -> None:
    client = MlflowClient()
    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, description=about)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):  # another process was faster
            raise


def _earlier(version: ModelVersion, digest: str) -> ModelVersion | None:
    """Returns the version with the same digest that another process has created first, or None: then `version` stays.

    Numbers rise in the order of creation, so of two processes that register the same digest the later one sees the earlier
    version, and waits until it is finished. A version not finished within SETTLING_SECONDS was left by a killed process: it
    is removed.
    """
    client, name, until = MlflowClient(), version.name, time.monotonic() + SETTLING_SECONDS
    while True:
        earlier = [v for v in _with_digest(name, digest) if _number(v) < _number(version)]
        if finished := [v for v in earlier if v.tags.get(FINISHED) == "true"]:
            return max(finished, key=_number)
        if not earlier:
            return None
        if time.monotonic() > until:
            for half_made in earlier:
                client.delete_model_version(name, half_made.version)
            return None
        time.sleep(0.2)


def log_folder(name: str, folder: Path, tags: Mapping[str, object], *, model_type: str) -> str:
    """Uploads a folder as a logged model of the active run and returns its id."""
    return log_model(name, lambda model: folder, tags, model_type=model_type)


def log_model(name: str, write: Callable[[LoggedModel], Path], tags: Mapping[str, object], *, model_type: str) -> str:
    """Makes a logged model of the active run, uploads the folder that `write` returns for it, and returns its id.

    The model is an output of the run and READY only after the upload. `log_model` of MLflow's flavors would query the history
    of every metric of the run, and a run over many tasks has hundreds.
    """
    run = mlflow.active_run()
    assert run is not None, "callers check"
    client = MlflowClient()
    texts = {key: str(value) for key, value in tags.items()}
    model = client.create_logged_model(run.info.experiment_id, name, run.info.run_id, tags=texts, model_type=model_type)
    client.log_model_artifacts(model.model_id, str(write(model)))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def log_lineage(run_id: str, versions: Iterable[ModelVersion]) -> None:
    """Records versions of other runs as inputs of a run (its own are outputs); idempotent."""
    others = [LoggedModelInput(logged_model(version)) for version in versions if version.run_id != run_id]
    if others:
        MlflowClient().log_inputs(run_id, models=others)


def logged_model(version: ModelVersion) -> str:
    """Returns the id of the logged model behind a version (MLflow's databases keep it only in the source's address)."""
    return version.source.removeprefix(MODELS)
