"""Versions of registered models: complete when they appear, and found by the digest of what they were made from.

Order of writing: artifacts, logged model with its parameters, version. Only the version is looked for, and one call makes it
with all that it says; what a killed process leaves behind is a logged model that nobody finds. Aliases move last, by decision.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelInput, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from pipeline.registry.claims import is_being_deleted
from pipeline.registry.names import about
from pipeline.registry.retries import RegistryError

DIGEST = "digest"
"""Parameter of a logged model: digest of configuration, data and base that it was made from."""

MODELS = "models:/"
"""Scheme of the address of a logged model, and of a registered one."""

NEWEST = "latest"
"""What MLflow calls the newest version of a registered model; nobody can set an alias of this name."""

REGISTERED, EVALUATED = "registered", "evaluated"
"""Status of a version before and after its first evaluation."""

_ADDRESS = re.compile(
    rf"(?:{MODELS})?(?P<name>[A-Za-z0-9_.-]+)(?:/(?P<version>[0-9]{{1,9}}|latest)|@(?P<alias>[A-Za-z0-9_.-]+))"
)

PAGE = 1000
"""Most results of a search."""

EXPERIMENTS_SECONDS = 60.0
"""How long the list of experiments, which versions are searched in, is not asked for again."""

_known: dict[str, tuple[float, list[str]]] = {}
"""When each registry's experiments were listed, and their ids."""


def find_version(name: str, digest: str) -> ModelVersion | None:
    """Returns the newest version of registered model `name` made from `digest`, or None; not one that is being deleted.

    What another process registers in an experiment that it has made within EXPERIMENTS_SECONDS may be missed; `create_version`
    misses nothing.
    """
    return max(_with_digest(name, digest, experiment_ids(anew=False)), key=number, default=None)


def _with_digest(name: str, digest: str, experiments: list[str]) -> list[ModelVersion]:
    client = MlflowClient()
    models = client.search_logged_models(experiments, f"params.{DIGEST} = '{digest}'") if experiments else []
    return [
        version
        for model in models
        if not is_being_deleted(model)
        for version in client.search_model_versions(f"name = '{name}' and source_path = '{MODELS}{model.model_id}'")
    ]


def experiment_ids(*, anew: bool = True) -> list[str]:
    """Returns the ids of all experiments; unless `anew`, those of a moment ago, if the active run's is one of them."""
    uri, run = mlflow.get_tracking_uri(), mlflow.active_run()
    when, known = _known.get(uri, (-inf, []))
    fresh = monotonic() - when < EXPERIMENTS_SECONDS and (run is None or run.info.experiment_id in known)
    if anew or not fresh:
        known = [each.experiment_id for each in paged(partial(MlflowClient().search_experiments, max_results=PAGE))]
        _known[uri] = (monotonic(), known)
    return known


def number(version: ModelVersion) -> int:
    """Returns a version's number: MLflow gives a number from a database, a text from a server."""
    return int(version.version)


def versions_of(name: str) -> list[ModelVersion]:
    """Returns all versions of a registered model, the newest first; none where there is no such model."""
    return sorted(all_versions(f"name = '{name}'"), key=number, reverse=True)


def all_versions(where: str = "") -> Iterator[ModelVersion]:
    """Yields the versions of the registry that `where` chooses, by default all."""
    return paged(partial(MlflowClient().search_model_versions, where, max_results=PAGE))


def all_logged_models() -> Iterator[LoggedModel]:
    """Yields the logged models of all experiments."""
    experiments = experiment_ids()
    return (
        paged(partial(MlflowClient().search_logged_models, experiments, max_results=PAGE)) if experiments else iter(())
    )


def paged(search: Callable[..., Any]) -> Iterator[Any]:
    """Yields all results of a search of MLflow's client, page after page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def get_version(name: str, version_or_alias: int | str) -> ModelVersion:
    """Returns a version by number or alias, or the newest as `latest`; raises RegistryError that lists what there is."""
    client, wanted = MlflowClient(), str(version_or_alias)
    try:
        if wanted.isdigit():
            return client.get_model_version(name, wanted)
        return client.get_model_version_by_alias(name, wanted)
    except MlflowException as error:
        # MLflow says "invalid parameter" where an alias does not exist, "does not exist" for all else.
        if error.error_code not in {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}:
            raise
        raise RegistryError(f"no {wanted!r} in {name!r}; {_inventory(client, name)}") from None


FILES = "files"
"""Parameter of a logged model: the bytes of its files by name, as JSON, so that a list of them tells whether they are whole."""


def damage(location: str, sizes: Mapping[str, int], needed: Sequence[str] = ()) -> str | None:
    """Returns what is wrong with the files at an address, as far as a list of them tells; None where nothing is.

    `sizes` are their bytes by name; the `needed` ones must be there, whatever their size.
    """
    found = {Path(item.path).name: item.file_size for item in mlflow.artifacts.list_artifacts(artifact_uri=location)}
    for name in dict.fromkeys([*needed, *sizes]):
        if name not in found:
            return f"{location}/{name} is missing"
        if name in sizes and found[name] not in (None, sizes[name]):
            return f"{location}/{name} has {found[name]} bytes instead of {sizes[name]}"
    return None


def version_at(address: str) -> ModelVersion:
    """Returns the version at `<name>/<version>`, `<name>/latest` or `<name>@<alias>`, with `models:/` before it or not.

    Raises RegistryError for any other address, and for a missing version, with the available ones.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RegistryError(
            f"{address!r} names no version; write it like models:/tiny.pool.demo/3 or models:/tiny.pool.demo@champion"
        )
    return get_version(match["name"], match["version"] or match["alias"])


def is_ours(version: ModelVersion) -> bool:
    """Whether this project has registered a version, as far as its tags tell: others may have names like ours."""
    return bool({"status", "fingerprint"} & version.tags.keys())


def _inventory(client: MlflowClient, name: str) -> str:
    models = client.search_registered_models(f"name = '{name}'")
    if not models:
        return "nothing is registered under that name"
    numbers = ", ".join(str(number(version)) for version in reversed(versions_of(name)))
    aliases = ", ".join(f"{alias} = {version}" for alias, version in sorted(models[0].aliases.items()))
    return f"there are versions {numbers} and aliases {aliases or '(none)'}" if numbers else "it has no versions"


def create_version(
    name: str, model_id: str, run_id: str, *, tags: Mapping[str, object], description: str
) -> ModelVersion:
    """Makes the logged model `model_id`, which has a `digest`, the next version of `name`, which is created if need be.

    If another process has made a version of the same digest meanwhile, that is returned.
    """
    client = MlflowClient()
    model = client.get_logged_model(model_id)
    digest = model.params[DIGEST]
    _ensure_model(name)
    texts = {key: str(value) for key, value in tags.items()}
    version = client.create_model_version(
        name, f"{MODELS}{model_id}", run_id, tags=texts, model_id=model_id, description=description
    )
    # Numbers rise in the order of creation: of two processes that register the same digest, the later one sees both.
    first = min(_with_digest(name, digest, experiment_ids()), key=number)
    if number(first) < number(version):
        client.delete_model_version(name, version.version)
    else:  # what MLflow's pages show on a logged model, and `mlflow.register_model` writes
        registered = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
        registered.append({"name": name, "version": str(version.version)})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(registered)})
    return first


def _ensure_model(name: str) -> None:
    client = MlflowClient()
    if client.search_registered_models(f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, description=about(name))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):  # another process was faster
            raise


def log_folder(name: str, folder: Path, params: Mapping[str, object], *, model_type: str) -> str:
    """Uploads a folder as a logged model of the active run and returns its id."""
    return log_model(name, lambda model: folder, params, model_type=model_type)


def log_model(name: str, write: Callable[[LoggedModel], Path], params: Mapping[str, object], *, model_type: str) -> str:
    """Makes a logged model of the active run, uploads the folder that `write` returns for it, and returns its id.

    The model is an output of the run and READY only after the upload. `log_model` of MLflow's flavors would query the history
    of every metric of the run, and a run over many tasks has hundreds.
    """
    assert DIGEST in params, "a version is found again by its digest"
    run = mlflow.active_run()
    assert run is not None, "callers check"
    client = MlflowClient()
    texts = {key: str(value) for key, value in params.items()}
    model = client.create_logged_model(
        run.info.experiment_id, name, run.info.run_id, params=texts, model_type=model_type
    )
    client.log_model_artifacts(model.model_id, str(write(model)))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model.model_id


def log_lineage(run_id: str, versions: Iterable[ModelVersion]) -> None:
    """Records versions of other runs as inputs of a run (its own are outputs); idempotent."""
    others = [LoggedModelInput(logged_model_id(version)) for version in versions if version.run_id != run_id]
    if others:
        MlflowClient().log_inputs(run_id, models=others)


def logged_model_id(version: ModelVersion) -> str:
    """Returns the id of the logged model behind a version (MLflow's databases keep it only in the source's address)."""
    return version.source.removeprefix(MODELS)


def logged_model(version: ModelVersion) -> Any:
    """Returns the logged model behind a version, with parameters and metrics."""
    return MlflowClient().get_logged_model(logged_model_id(version))


def describe(version: ModelVersion, *, tags: Mapping[str, object], description: str | None = None) -> None:
    """Sets tags and, if given, the description of a version; what is there already is not written again."""
    client = MlflowClient()
    for key, value in tags.items():
        if version.tags.get(key) != str(value):
            client.set_model_version_tag(version.name, str(version.version), key, str(value))
    if description is not None and version.description != description:
        client.update_model_version(version.name, str(version.version), description=description)
