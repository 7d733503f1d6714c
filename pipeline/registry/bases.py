"""Bases in the registry: `<base>.base` holds one version per checkpoint that pools use.

Pool versions refer to it. A copy in each of them would be 16 GB per task for an 8B base.
"""

import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.config import BaseModelConfig, without_secrets
from pipeline.models.checkpoints import checkpoint, files_of, fingerprint, hub_id
from pipeline.registry.names import base_name
from pipeline.registry.retries import RegistryError, shown_uri
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import DIGEST, create_version, find_version, log_folder, logged_model


def register_base(base: BaseModelConfig) -> ModelVersion:
    """Uploads a base's checkpoint as a new version, unless it is registered; needs an open run."""
    run, folder, name = active_run(), checkpoint(base), base_name(base.label)
    base_fingerprint = fingerprint(folder)
    if (version := find_version(name, base_fingerprint)) is not None:
        return version
    params = {DIGEST: base_fingerprint, "base": base.label, "path": without_secrets(base.path)}
    with tempfile.TemporaryDirectory() as scratch:
        for file in files_of(folder):  # a downloaded folder may hold other files
            (Path(scratch) / file.name).symlink_to(file.resolve())
        model_id = log_folder(base.label, Path(scratch), params, model_type="base")
    return create_version(
        name,
        model_id,
        run.info.run_id,
        tags={"fingerprint": base_fingerprint[:12]},
        description=f"The frozen checkpoint `{params['path']}` that pools of base `{base.label}` answer with.",
    )


def base_folder(model_id: str) -> Path:
    """Returns the folder of a registered base: its location on this machine, or a download.

    Raises RegistryError where the current registry does not have it.
    """
    try:
        location = MlflowClient().get_logged_model(model_id).artifact_location
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=location))
    except MlflowException as error:
        raise RegistryError(
            f"this pool needs the base {model_id}, which {shown_uri()} does not have: {error.message}. "
            "Set MLFLOW_TRACKING_URI to the registry that the pool comes from"
        ) from None


def find_base(base_label: str, base_fingerprint: str) -> ModelVersion:
    """Returns the version of a base that has a fingerprint; raises RegistryError where there is none."""
    if (version := find_version(base_name(base_label), base_fingerprint)) is not None:
        return version
    raise RegistryError(
        f"{base_name(base_label)} has no version with fingerprint {base_fingerprint}: it is registered with the first pool "
        "over it; let the `pointsman learn` that made the expert end, or run it again"
    )


def public_name(version: ModelVersion) -> str:
    """Returns what others call a registered base: its hub id, or the name that it was given, never a path of some machine."""
    params = logged_model(version).params
    return hub_id(params["path"]) or str(params["base"])


def download_base_files(version: ModelVersion, patterns: Sequence[str], into: Path) -> list[Path]:
    """Copies the files of a registered base whose names match to the folder `into`; its weights are not fetched for that."""
    location = logged_model(version).artifact_location
    names = [Path(item.path).name for item in mlflow.artifacts.list_artifacts(artifact_uri=location)]
    wanted = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    into.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        mlflow.artifacts.download_artifacts(artifact_uri=f"{location}/{name}", dst_path=str(into))
    return [into / name for name in wanted]
