"""Experts in the registry: `<base>.expert.<task>` has a version per training of the task.

Pools refer to these versions. Loading a pool from the registry takes its experts from the user's cache, or fetches them.
"""

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.config import without_secrets
from pipeline.files import replace_folder
from pipeline.registry.artifacts import not_here
from pipeline.registry.claims import take_up
from pipeline.registry.descriptions import expert_description
from pipeline.registry.names import expert_name
from pipeline.registry.retries import RegistryError, is_away, reason_of
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import (
    DIGEST,
    FILES,
    REGISTERED,
    create_version,
    find_version,
    get_version,
    log_folder,
    logged_model,
    logged_model_id,
)
from pipeline.routing.contents import Contents
from pipeline.routing.expert import CARD, Expert, ExpertCard
from pipeline.routing.store import ExpertReference, ExpertStore, cache_folder

CONTENT = "content"
"""Parameter of a logged model: digest of the expert's files (`Contents.digest`)."""


class MissingExpertError(RegistryError):
    """An expert that the current registry lacks; the message names it, its version and the remedy."""


def register_expert(
    base_label: str, folder: str | Path, *, card: ExpertCard | None = None, rows: int | None = None
) -> ModelVersion:
    """Registers an expert folder as a version of its task's model; needs an open run (`tracked_run`).

    If an expert with the same configuration digest exists, it is returned. `rows` is the number of rows that it learned from,
    where that is known. Raises ExpertError for a folder that is incomplete or was never trained; not with the `card` of an
    expert that a store has checked, whose weights are not read again.
    """
    run = active_run()
    if card is None:
        expert = Expert.load(folder)
        expert.check_trained()
        card = expert.card
    if (version := take_up_expert(base_label, card.task, card.config_digest)) is not None:
        return version
    described = card.model_dump(exclude={"name", "metrics", "identity", "trained_with", "config_digest"})
    params = {DIGEST: card.config_digest, "base": base_label, **described}
    if (contents := Contents.read(Path(folder))) is not None:
        params[CONTENT] = contents.digest
        params[FILES] = json.dumps({name: file.bytes for name, file in contents.files.items()})
    params |= {f"metric.{key}": value for key, value in card.metrics.items()}
    params |= {f"trained_with.{key}": value for key, value in card.trained_with.items()}
    model_id = log_folder(card.name, Path(folder), params, model_type="expert")
    tags: dict[str, object] = {"rank": card.rank, **({"rows": f"{rows:,}"} if rows else {}), "status": REGISTERED}
    return create_version(
        expert_name(base_label, card.task),
        model_id,
        run.info.run_id,
        tags=tags,
        description=expert_description(base_label, card, rows=rows),
    )


def find_expert(base_label: str, task: str, digest: str) -> ModelVersion | None:
    """Returns the expert of a task made from `digest` (configuration, data, base), or None."""
    return find_version(expert_name(base_label, task), digest)


def take_up_expert(base_label: str, task: str, digest: str) -> ModelVersion | None:
    """Returns the expert as `find_expert` does, for a pool that will refer to it: `gc` spares it meanwhile."""
    version = find_expert(base_label, task, digest)
    return version if version is not None and take_up(logged_model_id(version)) else None


def download_expert(base_label: str, task: str, version: int | str, into: str | Path) -> Path:
    """Copies a version of a task's expert (a number, an alias or `latest`) to the folder `into`, replacing it.

    Raises RegistryError that lists what there is.
    """
    return _download(get_version(expert_name(base_label, task), version), Path(into))


def reference_to(name: str, version: ModelVersion) -> ExpertReference:
    """Returns a pool's reference to its expert `name`, registered as this version."""
    params = logged_model(version).params
    return ExpertReference(
        name=name,
        digest=params[DIGEST],
        content=params.get(CONTENT),
        model=version.name,
        version=int(version.version),
    )


def card_of(version: ModelVersion) -> ExpertCard:
    """Reads an expert's card without its weights; raises RegistryError where it is missing or damaged."""
    address = f"{logged_model(version).artifact_location}/{CARD}"
    try:
        return ExpertCard.model_validate_json(mlflow.artifacts.load_text(address))
    except (MlflowException, OSError, ValueError) as error:
        if isinstance(error, MlflowException) and is_away(error):
            raise
        raise RegistryError(
            f"{version.name}/{version.version} is damaged: {address} is missing or cannot be read; bring its files back"
        ) from None


def fetch_expert(reference: ExpertReference, folder: Path) -> None:
    """Copies the expert that a pool refers to into `folder`: its version, or another version with its digest.

    Raises MissingExpertError where the registry has neither.
    """
    assert reference.model is not None, "pools that do not name a registered model hold their experts"
    version = None
    if reference.version is not None:
        with suppress(RegistryError):  # deleted
            version = get_version(reference.model, reference.version)
    if version is None and reference.digest is not None:
        version = find_version(reference.model, reference.digest) or _moved(reference, reference.digest)
    if version is None:
        raise MissingExpertError(_missing(reference))
    try:
        _download(version, folder)
    except MlflowException as error:
        if is_away(error):
            raise
        raise MissingExpertError(f"{_missing(reference)} ({reason_of(error)})") from None
    except OSError as error:  # MLflow raises it for an emptied artifact store on disk
        if is_away(error):
            raise
        why = not_here(logged_model(version).artifact_location) or error
        raise MissingExpertError(f"{_missing(reference)} ({why})") from None


def _moved(reference: ExpertReference, digest: str) -> ModelVersion | None:
    """Returns the version of an expert whose pool refers to it by a name of an earlier release."""
    assert reference.model is not None
    base_label, _, former = reference.model.rpartition(".")
    return find_expert(base_label, reference.name, digest) if former == "experts" else None


def registered_experts() -> ExpertStore:
    """Returns the store of the experts of registered pools: the user's cache, filled from the current registry."""
    return ExpertStore(cache_folder(), fetch_expert)


def _missing(reference: ExpertReference) -> str:
    return (
        f"{reference}: {reference.model} at {without_secrets(mlflow.get_tracking_uri())} does not have it. Set "
        "MLFLOW_TRACKING_URI to the registry that the pool comes from; where the version was deleted, run the `pointsman "
        "learn` that made it once more, which registers it anew, or use a version of the pool without this expert (`pointsman "
        "registry rollback` moves `champion` back)"
    )


def _download(version: ModelVersion, into: Path) -> Path:
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        # Not `models:/<name>/<version>`: that download adds a file of MLflow's own to the folder.
        source = MlflowClient().get_model_version_download_uri(version.name, str(version.version))
        files = [item for item in mlflow.artifacts.list_artifacts(artifact_uri=source) if not item.is_dir]
        if not files:
            raise FileNotFoundError(f"{source} holds no files")
        complete = Path(scratch) / "expert"
        for item in files:  # not what evaluations have left beside them
            address = f"{source}/{Path(item.path).name}"
            mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=str(complete))
        replace_folder(complete, into)
    return into
