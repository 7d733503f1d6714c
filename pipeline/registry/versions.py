"""What experts and pools have in common as versions of a registered model: found by tags, finished or not.

Order of writing: artifacts, version with its tags, alias, `finished`. A process killed in between leaves a version
without that last tag; nobody takes it for finished, and the next registration of the same thing removes it.
"""

from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.registry.tracking import RegistryError

DIGEST, FINISHED = "config_digest", "finished"
"""Tags of a version: what it was computed from (configuration, data, base), and that it is complete."""

MODELS = "models:/"
"""Scheme of the address of a logged model, and of a registered one."""

_PAGE = 1000


def find_finished(name: str, digest: str) -> ModelVersion | None:
    """Returns the newest finished version of registered model `name` made from `digest`, or None."""
    return max(_with_digest(name, digest, finished=True), key=_number, default=None)


def _with_digest(name: str, digest: str, *, finished: bool) -> list[ModelVersion]:
    found = MlflowClient().search_model_versions(f"name = '{name}' and tags.{DIGEST} = '{digest}'", max_results=_PAGE)
    return [version for version in found if (version.tags.get(FINISHED) == "true") == finished]


def _number(version: ModelVersion) -> int:
    return int(version.version)  # a number from a database, a text from a server


def get_version(name: str, version_or_alias: int | str) -> ModelVersion:
    """Returns a finished version by number or alias; raises RegistryError that lists what there is."""
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

    `tags` must hold `config_digest`; `about` describes the registered model when it is made.
    """
    assert DIGEST in tags, "a version is found again by its digest"
    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description=about)
    texts = {key: str(value) for key, value in tags.items()}
    version = client.create_model_version(name, f"{MODELS}{model_id}", run_id, tags=texts, model_id=model_id)
    client.set_registered_model_alias(name, alias, version.version)
    client.set_model_version_tag(name, version.version, FINISHED, "true")
    for half_made in _with_digest(name, texts[DIGEST], finished=False):
        client.delete_model_version(name, half_made.version)
    return get_version(name, version.version)


def log_folder(name: str, folder: Path, tags: Mapping[str, object], *, kind: str) -> str:
    """Uploads a folder as a logged model of the active run and returns its id.

    The model is an output of the run and READY only after the upload.
    """
    run = mlflow.active_run()
    assert run is not None, "callers check"
    client = MlflowClient()
    texts = {key: str(value) for key, value in tags.items()}
    model = client.create_logged_model(run.info.experiment_id, name, run.info.run_id, tags=texts, model_type=kind)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def log_lineage(run_id: str, versions: Mapping[str, ModelVersion]) -> None:
    """Records versions (by task) as inputs of a run; doing so again changes nothing."""
    MlflowClient().log_inputs(run_id, models=[LoggedModelInput(logged_model(v)) for v in versions.values()])


def logged_model(version: ModelVersion) -> str:
    """Returns the id of the logged model behind a version (MLflow's databases keep it only in the source's address)."""
    return version.source.removeprefix(MODELS)
