"""How the registry's commands reach it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient

from jobs.endings import user_errors
from jobs.lazy import importing
from jobs.registry.options import TRACKING_URI, registry_address
from jobs.terminal import Terminal
from pipeline.registry.browsing import find_model
from pipeline.registry.failures import registry_failures
from pipeline.registry.names import read_name
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import use_registry
from pipeline.registry.versions import MODELS


@contextmanager
def registry(uri: str | None) -> Iterator[Terminal]:
    """Opens the registry for a command; mistakes of the user, and failures of the registry, end it with one line."""
    with user_errors(), registry_failures():
        elsewhere = os.environ.get(TRACKING_URI)
        with importing():
            use_registry(registry_address(uri), TRACKING_URI if elsewhere and not uri else "--registry")
            MlflowClient()  # imports what speaks to a database
        yield Terminal()


def pool_model(name: str) -> str:
    """Returns the registered model of a pool that is there; raises RegistryError for anything else."""
    model = name.removeprefix(MODELS)
    if "/" in model or "@" in model:
        raise RegistryError(f"{name!r} names a version; name the pool alone, like {re.split('[/@]', model)[0]}")
    named = read_name(model)
    if named is None or named.kind != "pool":
        raise RegistryError(
            f"{name!r} is no pool; pools are called <base>.pool.<name>: pointsman registry list --kind pool"
        )
    find_model(model)
    return model
