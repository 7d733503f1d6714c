"""What no pool needs: uploads without a version, which killed processes leave behind, and what no pool refers to: experts, and
statistics of base prompts.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import time

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.registry.base_prompts import BASE_PROMPTS, is_complete
from pipeline.registry.claims import last_needed, may_delete
from pipeline.registry.contents import experts_of
from pipeline.registry.migration import FORMER_DIGEST
from pipeline.registry.names import read_name
from pipeline.registry.versions import DIGEST, all_logged_models, all_versions, is_ours, logged_model_id, number

KINDS = {"expert", "pool", "base"}
"""Types of logged models that are ours."""

HOUR = 3600.0


@dataclass(frozen=True)
class Garbage:
    """Something that no pool needs."""

    name: str
    """What it is: the version, or the upload's id."""
    why: str
    created: float
    """Seconds since 1970."""
    model: LoggedModel | None
    """Its upload, as it was read; None for a version whose upload is gone."""
    version: ModelVersion | None = None
    """None for an upload without a version."""

    @property
    def bytes(self) -> int:
        """Size of its files; 0 where another process has deleted it."""
        with _perhaps_gone():
            if self.model is not None:
                return sum(_sizes(MlflowClient().get_logged_model(self.model.model_id).artifact_location, ""))
        return 0

    @property
    def last_needed(self) -> float:
        """When it was made, or a registration last took it up, in seconds since 1970."""
        return self.created if self.model is None else max(self.created, last_needed(self.model))


def find_garbage(*, hours: float) -> list[Garbage]:
    """Lists what no pool needs, made or taken up longer than `hours` ago: what is younger may be on its way into a pool.

    Raises RegistryError where a pool cannot be read, so that nobody knows what it needs.
    """
    before, versions = time() - hours * HOUR, list(all_versions())
    used, models = {logged_model_id(version) for version in versions}, list(all_logged_models())
    found = [
        Garbage(model.model_id, f"upload of {model.name} without a version", model.creation_timestamp / 1000, model)
        for model in models
        if model.model_type in KINDS and DIGEST in model.params and model.model_id not in used
    ]
    pools = [version for version in versions if _is_pool(version)]
    found += _base_prompts(models, {logged_model_id(version) for version in pools})
    locations = {model.model_id: model.artifact_location for model in models}
    with ThreadPoolExecutor(16) as threads:
        experts = threads.map(experts_of, pools, [locations.get(logged_model_id(version)) for version in pools])
        needed = {address for each in experts for address in each.values()}
    # Experts that pools name as an earlier release called them share their upload with the version of the new name.
    uploads = {logged_model_id(version) for version in versions if f"{version.name}/{version.version}" in needed}
    by_id = {model.model_id: model for model in models}
    for version in versions:
        named = read_name(version.name)
        if (
            named is not None
            and named.kind == "expert"
            and is_ours(version)
            and logged_model_id(version) not in uploads
        ):
            name = f"{version.name}/{version.version}"
            created, model = version.creation_timestamp / 1000, by_id.get(logged_model_id(version))
            found.append(Garbage(name, "no pool refers to it", created, model, version))
    return sorted((each for each in found if each.last_needed < before), key=lambda each: each.name)


def _base_prompts(models: Sequence[LoggedModel], pools: set[str]) -> Iterator[Garbage]:
    """Yields uploads of statistics of base prompts that none of the `pools` (ids of logged models) refers to.

    Where the same are stored several times, pools use the newest (`base_prompts`).
    """
    needed = {model.params.get(BASE_PROMPTS) for model in models if model.model_id in pools}
    newest: dict[str, LoggedModel] = {}
    for model in sorted(filter(is_complete, models), key=lambda model: model.creation_timestamp):
        newest[model.params[DIGEST]] = model
    for model in models:
        if model.model_type != BASE_PROMPTS:
            continue
        digest = model.params.get(DIGEST, "")
        if not is_complete(model):
            why = "upload that was cut off"
        elif digest not in needed:
            why = "statistics of base prompts that no pool refers to"
        elif newest[digest].model_id != model.model_id:
            why = "statistics of base prompts that are stored once more"
        else:
            continue
        yield Garbage(model.model_id, why, model.creation_timestamp / 1000, model)


def remove(garbage: Garbage) -> bool:
    """Deletes a version and its upload, unless another process was faster; MLflow keeps the files until `mlflow gc`.

    Returns False, and deletes nothing, where a registration has taken it up since it was listed.
    """
    client, model = MlflowClient(), garbage.model
    if model is not None:
        with _perhaps_gone():
            if not may_delete(model):
                return False
    if garbage.version is not None:
        with _perhaps_gone():
            client.delete_model_version(garbage.version.name, str(number(garbage.version)))
    if model is not None:
        with _perhaps_gone():
            client.delete_logged_model(model.model_id)
    return True


@contextmanager
def _perhaps_gone() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise


def _is_pool(version: ModelVersion) -> bool:
    named = read_name(version.name)
    if named is not None:
        return named.kind == "pool" and is_ours(version)
    return version.name.endswith(".pool") and FORMER_DIGEST in version.tags


def _sizes(location: str, path: str) -> Iterator[int]:
    for item in mlflow.artifacts.list_artifacts(artifact_uri=f"{location}/{path}" if path else location):
        below = f"{path}/{item.path.rsplit('/', 1)[-1]}" if path else item.path.rsplit("/", 1)[-1]
        if item.is_dir:
            yield from _sizes(location, below)
        else:
            yield item.file_size or 0
