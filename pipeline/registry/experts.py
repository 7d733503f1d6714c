"""Experts in the registry: `<base>.experts` has a version per trained expert; aliases mark each task's current one."""

import tempfile
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.files import replace_folder
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import DIGEST, create_version, find_finished, get_version, log_folder
from pipeline.routing.expert import Expert


def experts_name(base_label: str) -> str:
    """Returns the registered model that holds the experts of a base."""
    return f"{base_label}.experts"


def register_expert(base_label: str, folder: str | Path) -> ModelVersion:
    """Registers an expert folder and points the task's alias at it; needs an open run (`tracked_run`).

    An expert with the same configuration digest is returned as it is, and no alias moves. Raises ExpertError for a
    folder that is incomplete or was never trained.
    """
    run = active_run()
    expert = Expert.load(folder)
    expert.check_trained()
    card, name = expert.card, experts_name(base_label)
    if (version := find_finished(name, card.config_digest)) is not None:
        return version
    described = card.model_dump(exclude={"name", "metrics", "identity", "trained_with"})
    assert DIGEST in described, "the card and the registry name the digest alike"
    tags = described | {f"metric.{key}": value for key, value in card.metrics.items()}
    tags |= {f"trained_with.{key}": value for key, value in card.trained_with.items()}
    model_id = log_folder(card.name, Path(folder), tags, kind="expert")
    about = f"LoRA experts over {base_label}, a version per training; aliases name each task's current one"
    return create_version(name, model_id, run.info.run_id, tags, alias=card.task, about=about)


def find_expert(base_label: str, digest: str) -> ModelVersion | None:
    """Returns the finished expert made from `digest` (configuration, data, base), or None: then it is to be trained."""
    return find_finished(experts_name(base_label), digest)


def download_expert(base_label: str, task_or_version: int | str, into: str | Path) -> Path:
    """Copies an expert, by task (its current version) or version number, to the folder `into`, replacing it.

    Raises RegistryError that lists the experts there are.
    """
    name, into = experts_name(base_label), Path(into)
    version = get_version(name, task_or_version)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        # Not `models:/<name>/<version>`: that download adds a file of MLflow's own to the folder.
        source = MlflowClient().get_model_version_download_uri(name, str(version.version))
        complete = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=scratch)
        replace_folder(Path(complete), into)
    return into
