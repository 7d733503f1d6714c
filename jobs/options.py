"""Options that jobs share: the configuration file, overrides, the cluster's address; how errors of the user are shown."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.local import JOB_CONFIG, ClusterError
from cluster.preflight import PreflightError
from cluster.submit import SubmitError, submit
from pipeline.config import ConfigError, LearnConfig, fields_of, load_config
from pipeline.models.checkpoints import BaseError
from pipeline.models.internvl2 import ConversionError
from pipeline.registry.tracking import RegistryError
from pipeline.routing.expert import ExpertError
from pipeline.routing.pool import PoolError
from pipeline.streams.sources import StreamError
from pipeline.training.run import TrainingError

EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"
"""The stream that ships with the project."""

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, e.g. jobs/configs/embedded.yaml.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change, e.g. expert.rank=16 name=mine.", metavar="[FIELD=VALUE]..."),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Submit to the Ray cluster with this dashboard, e.g. http://127.0.0.1:8265, instead of running here."
    ),
]

USER_ERRORS = (
    ConfigError, BaseError, StreamError, TrainingError, ClusterError, PreflightError, SubmitError, RegistryError,
    ExpertError, PoolError, ConversionError,
)  # fmt: skip
"""What a user can mend; shown as a message, not as a traceback."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a mistake of the user into a message and exit code 2."""
    try:
        yield
    except USER_ERRORS as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def load(config: Path, overrides: list[str] | None) -> LearnConfig:
    """Reads the configuration of a stream with overrides.

    A submitted job runs in a copy of the working folder that Ray throws away; there, a relative `output` counts from
    `~/pointsman`, so that results last and a job that is submitted again finds them.
    """
    settings = load_config(config, overrides or [], LearnConfig)
    if JOB_CONFIG in os.environ and not Path(settings.output).is_absolute():
        settings = settings.model_copy(update={"output": str(Path.home() / "pointsman" / settings.output)})
        typer.echo(f"output goes to {settings.folder}")
    return settings


def job_command(module: str, config: Path, overrides: list[str] | None, address: str, *more: str) -> NoReturn:
    """Submits a job to a cluster: the same module, configuration and overrides; ends with the job's exit code."""
    root = Path.cwd()
    if not config.resolve().is_relative_to(root):
        raise ConfigError(f"{config}: must lie below {root}, which is what the cluster gets as working directory")
    relative = config.resolve().relative_to(root)
    outcome = submit(["python", "-m", module, str(relative), *(overrides or []), *more], address, root)
    sys.exit(outcome.exit_code)


def fields_help() -> str:
    """Returns every field of a stream's configuration with its default and meaning, for `--help`."""
    lines = ["Fields of CONFIG, each of which FIELD=VALUE overrides:", ""]
    for name, field in fields_of(LearnConfig):
        if not field.description:
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines += [f"{name}  ({default})", f"    {' '.join(field.description.split())}"]
    return "\n".join(lines)
