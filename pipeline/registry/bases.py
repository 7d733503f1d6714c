"""Bases in the registry: `<base>.base` holds one version per checkpoint that pools use.

Pool versions refer to it. A copy in each of them would be 16 GB per task for an 8B base.
"""

import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.config import BaseModelConfig, without_secrets
from pipeline.models.checkpoints import checkpoint, files_of, fingerprint
from pipeline.registry.names import base_name
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import DIGEST, create_version, find_version, log_folder


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
            f"this pool needs the base {model_id}, which {mlflow.get_tracking_uri()} does not have: {error.message}. "
            "Set MLFLOW_TRACKING_URI to the registry that the pool comes from"
        ) from None
