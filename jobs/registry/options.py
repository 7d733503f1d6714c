"""Options of the registry's commands, and how they reach the registry."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from jobs.endings import user_errors
from jobs.terminal import Terminal
from pipeline.registry.browsing import find_model
from pipeline.registry.failures import registry_failures
from pipeline.registry.names import read_name
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import use_registry
from pipeline.registry.versions import MODELS

DEFAULT = "sqlite:///runs/mlflow.db"

TRACKING_URI = "MLFLOW_TRACKING_URI"
"""Environment variable of MLflow that names the registry where no option does."""

RegistryUri = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help="The registry: sqlite:///<file>, a database (postgresql://, mysql+pymysql://) or http(s)://<server>; default: "
        f"$MLFLOW_TRACKING_URI, or {DEFAULT}.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Version = Annotated[
    str,
    typer.Argument(
        help="NAME, NAME/3, NAME/latest or NAME@champion; NAME alone: its champion, else its newest version."
    ),
]

Pool = Annotated[str, typer.Argument(help="Registered model of the pool, e.g. tiny.pool.demo.")]


def registry_address(uri: str | None) -> str:
    """Returns the address of the registry that a command means, given or not."""
    return uri or os.environ.get(TRACKING_URI) or DEFAULT


@contextmanager
def registry(uri: str | None) -> Iterator[Terminal]:
    """Opens the registry for a command; mistakes of the user, and failures of the registry, end it with one line."""
    with user_errors(), registry_failures():
        elsewhere = os.environ.get(TRACKING_URI)
        use_registry(registry_address(uri), TRACKING_URI if elsewhere and not uri else "--registry")
        yield Terminal()


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    typer.echo(json.dumps(value, indent=2))


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
