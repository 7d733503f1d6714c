"""Options that jobs share: the configuration file, overrides, the cluster's address."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

import pipeline.config
from cluster.submitted import is_submitted
from jobs.submission import HOME, JobFiles, submit_command
from pipeline.config import AddConfig, Config, LearnConfig, is_address, load_config
from pipeline.config.loading import aliases_of, documented_fields

C = TypeVar("C", AddConfig, LearnConfig)

DEMO = Path(__file__).parent / "configs" / "demo.yaml"
"""The stream that ships with the project."""

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, e.g. jobs/configs/demo.yaml.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields to change, e.g. expert.rank=16 name=mine.", metavar="[FIELD=VALUE]..."),
]


def load(config: Path, overrides: list[str] | None) -> LearnConfig:
    """Reads the configuration of a stream with overrides (see `load_as`)."""
    return load_as(config, overrides, LearnConfig)


def load_as(config: Path, overrides: list[str] | None, config_class: type[C]) -> C:
    """Reads a configuration with overrides.

    A submitted job runs in a copy of the working folder that Ray throws away; there, a relative `output` counts from
    `~/pointsman`, so that results last and a job that is submitted again finds them.
    """
    settings = load_config(config, overrides or [], config_class)
    if (output := lasting(settings.output)) != settings.output:
        settings = settings.model_copy(update={"output": output})
        typer.echo(f"output goes to {settings.output}")
    return settings


def lasting(folder: str) -> str:
    """Returns a folder or an address for results as it is, or, where it is relative in a submitted job, below `~/pointsman`."""
    moves = is_submitted() and not Path(folder).is_absolute() and not is_address(folder)
    return str(HOME.expanduser() / folder) if moves else folder


def check_output(settings: AddConfig | LearnConfig) -> None:
    """Raises StorageError where results go to an address that cannot be used: before all is imported that a job needs."""
    if is_address(settings.output):
        from pipeline.storage.remote import RemoteFolder  # with pyarrow

        RemoteFolder(settings.output).check()


def job_command(
    module: str,
    config: Path,
    overrides: list[str] | None,
    address: str,
    *more: str,
    config_class: type[AddConfig] | type[LearnConfig] = LearnConfig,
    files: JobFiles | None = None,
) -> NoReturn:
    """Submits a job of a configuration to a cluster, with `more` words after it and the `files` that these name.

    Ends with the job's exit code.
    """
    settings, files = load_config(config, overrides or [], config_class), files or JobFiles()
    command = module.removeprefix("jobs.").replace("_", "-")
    submit_command(
        [command, files.config(config, overrides or [], config_class), *more],
        [command, str(config), *(overrides or []), *more],
        address,
        files,
        run=settings.name or settings.task.name if isinstance(settings, AddConfig) else settings.name,
        output=settings.output,
    )


def fields_help(config_class: str, intro: Sequence[str]) -> str:
    """Returns `intro`, then every field of a configuration class with its default and meaning, for `--help`."""
    fields: type[Config] = getattr(pipeline.config, config_class)
    lines = [*intro]
    aliases: dict[str, list[str]] = {}
    for alias, name in aliases_of(fields).items():
        aliases.setdefault(name, []).append(f"also {alias}")
    for name, field in documented_fields(fields):
        if not field.description:
            continue
        default = field.get_default(call_default_factory=True)
        notes = ["required"] if field.is_required() else [] if isinstance(default, Config) else [f"default {default!r}"]
        notes += aliases.get(name.replace("[]", ""), [])
        lines += [f"{name}  ({'; '.join(notes)})" if notes else name, f"    {' '.join(field.description.split())}"]
    return "\n".join(lines)
