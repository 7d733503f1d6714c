"""Options of the commands that use a registry."""

import os
from typing import Annotated

import typer

from jobs.options import lasting

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

AddTo = Annotated[
    str,
    typer.Option(
        "--pool",
        help="The pool's version: models:/NAME@champion, NAME/3, or NAME: its champion, else its newest version.",
    ),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Let the new expert take the place of the pool's expert of that name.")
]
Pool = Annotated[str, typer.Argument(help="Registered model of the pool, e.g. tiny.pool.demo.")]


def registry_address(uri: str | None) -> str:
    """Returns the address of the registry that a command means, given or not."""
    return uri or os.environ.get(TRACKING_URI) or f"sqlite:///{lasting('runs')}/mlflow.db"
