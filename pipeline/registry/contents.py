"""What a registered pool says of its experts, read without torch."""

import json
from typing import Any, NamedTuple

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.registry.artifacts import not_here
from pipeline.registry.failures import failure_of
from pipeline.registry.retries import RegistryError
from pipeline.registry.versions import logged_model

POOL_FOLDER = "artifacts/pool"
"""Where a pool's own files lie among a version's artifacts."""

POOL_CARD = f"{POOL_FOLDER}/pool.json"
"""Its card."""

INSIDE = "in the pool"
"""In place of a version: earlier releases kept experts in the pool."""


def experts_of(version: ModelVersion, location: str | None = None) -> dict[str, str]:
    """Returns the experts of a pool's version by name, as `<model>/<version>`, or INSIDE.

    Whoever knows the `location` of its logged model saves asking for it.
    """
    return dict(map(_expert, _card(version, location)["experts"]))


def _expert(reference: str | dict[str, Any]) -> tuple[str, str]:
    """Returns an expert's name and address, however the pool refers to it (`ExpertReference`)."""
    if isinstance(reference, str):
        address = reference.partition(" ")[0]
        model, registered, _ = address.partition("/")
        return (model.rpartition(".")[2], address) if registered else (reference, INSIDE)
    return reference["name"], f"{reference['model']}/{reference['version']}" if reference.get("model") else INSIDE


def retired_of(version: ModelVersion) -> list[str]:
    """Returns the names of a pool's retired experts."""
    return list(_card(version).get("retired", ()))


class Place(NamedTuple):
    """Which expert a pool has of a task."""

    address: str
    """`<model>/<version>`, or INSIDE."""
    retired: bool


def places_of(version: ModelVersion) -> dict[str, Place]:
    """Returns the experts of a pool's version by name, with those that are retired."""
    retired = set(retired_of(version))
    return {name: Place(address, name in retired) for name, address in experts_of(version).items()}


def contains(version: ModelVersion, other: ModelVersion) -> bool:
    """Whether a pool's version has every expert of another one, in the same version."""
    return experts_of(version).items() >= experts_of(other).items()


def _card(version: ModelVersion, location: str | None = None) -> dict[str, Any]:
    """Reads a pool's card as it is: to check it as a pool does would take torch. Raises RegistryError where it is missing."""
    location = location or logged_model(version).artifact_location
    try:
        card: dict[str, Any] = json.loads(mlflow.artifacts.load_text(f"{location}/{POOL_CARD}"))
        list(card["experts"])
        return card
    except (MlflowException, OSError, ValueError, LookupError, TypeError) as error:
        if failure_of(error) is not None:
            raise
        what = f"{version.name}/{version.version}"
        if elsewhere := not_here(location):
            raise RegistryError(f"{what}: {elsewhere}") from None
        raise RegistryError(
            f"{what} is damaged: {location}/{POOL_CARD} is missing or cannot be read; bring its files back, or use another "
            "version"
        ) from None
