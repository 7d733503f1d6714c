"""Where a registry keeps the files of versions, and what one says where this machine does not reach them."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from pipeline.config import without_secrets
from pipeline.registry.retries import RegistryError, shown_uri

ARTIFACTS = "mlartifacts"
"""Folder of artifacts where nobody names another."""

LONGEST = 200 - len(f"/{'0' * 32}/artifacts")
"""Most characters of a location in PostgreSQL and MySQL, which keep 200 of the place of a run; SQLite keeps any number."""


def absolute(location: str) -> str:
    """Returns a location as MLflow stores it: addresses as they are, folders as absolute ones."""
    return location if "://" in location else Path(location).resolve().as_uri()


def check_length(location: str) -> None:
    """Raises RegistryError for a location that a database would refuse in the middle of the first run."""
    if len(location) > LONGEST:
        raise RegistryError(
            f"registry.artifacts: {without_secrets(location)} has {len(location)} characters, of which databases keep "
            f"{LONGEST}; choose a shorter one"
        )


def make_experiment(name: str, location: str | None) -> str:
    """Makes an experiment and the folder of its artifacts; returns its id."""
    if (folder := _folder(location)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return MlflowClient().create_experiment(name, artifact_location=location)


def check_reached(experiment: Experiment) -> None:
    """Raises RegistryError where an experiment keeps its artifacts in a folder that this machine does not have."""
    folder = _folder(experiment.artifact_location)
    if folder is not None and not folder.exists():
        raise RegistryError(
            f"experiment {experiment.name!r} of {shown_uri()} keeps its artifacts in {folder}, which this machine does not "
            "have: mount it there, or choose another registry.experiment, with registry.artifacts where all machines reach it"
        )


def not_here(location: str) -> str:
    """Returns why this machine does not have the files of a logged model; empty where something else must be the matter.

    `location` is that of the model: `<location of its experiment>/models/<id>/artifacts`.
    """
    folder = _folder(location)
    if folder is None or len(folder.parents) < 3 or (root := folder.parents[2]).exists():
        return ""
    return (
        f"its files lie in {root}, which this machine does not have: mount that folder there, or read the registry through an "
        "`mlflow server --serve-artifacts` that has it"
    )


def _folder(location: str | None) -> Path | None:
    """Returns the folder of a location on a disk; None for any other."""
    return Path(local_file_uri_to_path(location)) if location and is_local_uri(location) else None
