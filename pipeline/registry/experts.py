"""Experts in the registry: `<base>.experts` has a version per trained expert; aliases mark each task's current one.

Pools refer to these versions. Loading a pool from the registry takes its experts from the user's cache, or fetches them.
"""

import tempfile
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.config import without_secrets
from pipeline.files import replace_folder
from pipeline.registry.retries import RegistryError, is_away
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import DIGEST, create_version, find_finished, get_version, log_folder
from pipeline.routing.contents import Contents
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.store import ExpertReference, ExpertStore, cache_folder

CONTENT = "content"
"""Tag of a version: digest of the expert's files (`Contents.digest`); versions of earlier releases lack it."""


class MissingExpertError(RegistryError):
    """An expert that the current registry lacks; the message names it, its version and the remedy."""


def experts_name(base_label: str) -> str:
    """Returns the registered model that holds the experts of a base."""
    return f"{base_label}.experts"


def register_expert(base_label: str, folder: str | Path, *, card: ExpertCard | None = None) -> ModelVersion:
    """Registers an expert folder and points the task's alias at it; needs an open run (`tracked_run`).

    If an expert with the same configuration digest exists, it is returned and no alias moves. Raises ExpertError for a
    folder that is incomplete or was never trained; not with the `card` of an expert that a store has checked, whose weights
    are not read again.
    """
    run = active_run()
    if card is None:
        expert = Expert.load(folder)
        expert.check_trained()
        card = expert.card
    name = experts_name(base_label)
    if (version := find_finished(name, card.config_digest)) is not None:
        return version
    described = card.model_dump(exclude={"name", "metrics", "identity", "trained_with"})
    assert DIGEST in described, "the card and the registry name the digest alike"
    tags = described | {f"metric.{key}": value for key, value in card.metrics.items()}
    if (contents := Contents.read(Path(folder))) is not None:
        tags[CONTENT] = contents.digest
    tags |= {f"trained_with.{key}": value for key, value in card.trained_with.items()}
    model_id = log_folder(card.name, Path(folder), tags, model_type="expert")
    about = f"LoRA experts over {base_label}, a version per training; aliases name each task's current one"
    return create_version(name, model_id, run.info.run_id, tags, alias=card.task, about=about)


def find_expert(base_label: str, digest: str) -> ModelVersion | None:
    """Returns the finished expert made from `digest` (configuration, data, base), or None."""
    return find_finished(experts_name(base_label), digest)


def download_expert(base_label: str, task_or_version: int | str, into: str | Path) -> Path:
    """Copies an expert, by task (its current version) or version number, to the folder `into`, replacing it.

    Raises RegistryError that lists the available experts.
    """
    return _download(get_version(experts_name(base_label), task_or_version), Path(into))


def reference_to(name: str, version: ModelVersion) -> ExpertReference:
    """Returns a pool's reference to its expert `name`, registered as this version."""
    return ExpertReference(
        name=name,
        digest=version.tags[DIGEST],
        content=version.tags.get(CONTENT),
        model=version.name,
        version=int(version.version),
    )


def fetch_expert(reference: ExpertReference, folder: Path) -> None:
    """Copies the expert that a pool refers to into `folder`: its version, or another version with its digest.

    Raises MissingExpertError where the registry has neither.
    """
    assert reference.model is not None, "pools that do not name a registered model hold their experts"
    version = None
    if reference.version is not None:
        with suppress(RegistryError):  # deleted, or never finished
            version = get_version(reference.model, reference.version)
    if version is None and reference.digest is not None:
        version = find_finished(reference.model, reference.digest)
    if version is None:
        raise MissingExpertError(_missing(reference))
    try:
        _download(version, folder)
    except MlflowException as error:
        if is_away(error):
            raise
        raise MissingExpertError(f"{_missing(reference)} ({error.message})") from None
    except OSError as error:  # MLflow raises it for an emptied artifact store on disk
        raise MissingExpertError(f"{_missing(reference)} ({error})") from None


def registered_experts() -> ExpertStore:
    """Returns the store of the experts of registered pools: the user's cache, filled from the current registry."""
    return ExpertStore(cache_folder(), fetch_expert)


def _missing(reference: ExpertReference) -> str:
    return (
        f"{reference}: {reference.model} at {without_secrets(mlflow.get_tracking_uri())} does not have it. Set "
        "MLFLOW_TRACKING_URI to the registry that the pool comes from; where the version was deleted, run the `pointsman "
        "learn` that made it once more, which registers it anew, or use a version of the pool without this expert (alias "
        "`champion` can be moved back)"
    )


def _download(version: ModelVersion, into: Path) -> Path:
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        # Not `models:/<name>/<version>`: that download adds a file of MLflow's own to the folder.
        source = MlflowClient().get_model_version_download_uri(version.name, str(version.version))
        complete = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=scratch)
        replace_folder(Path(complete), into)
    return into
