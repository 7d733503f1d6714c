"""Options that jobs share: the configuration file, overrides, the cluster's address."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

import pipeline.config
from cluster.submitted import is_submitted
from pipeline.config import AddConfig, Config, ConfigError, LearnConfig, holds_secrets, load_config, without_secrets
from pipeline.config.loading import aliases_of, documented_fields

C = TypeVar("C", AddConfig, LearnConfig)

DEMO = Path(__file__).parent / "configs" / "demo.yaml"
"""The stream that ships with the project."""

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, e.g. jobs/configs/demo.yaml.", metavar="CONFIG")]
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
    """Returns a folder for results as it is, or, where it is relative in a submitted job, below `~/pointsman`."""
    moves = is_submitted() and not Path(folder).is_absolute()
    return str(Path.home() / "pointsman" / folder) if moves else folder


def job_command(module: str, config: Path, overrides: list[str] | None, address: str, *more: str) -> NoReturn:
    """Submits a job to a cluster: the same module, configuration and overrides; ends with the job's exit code."""
    check_exposed([*(overrides or []), *more], f"write it into {config}")
    submit_job(module, [below_here(config), *(overrides or []), *more], address)


def submit_job(module: str, words: Sequence[str], address: str) -> NoReturn:
    """Submits a job to a cluster: a module and the words of its command line; ends with the job's exit code."""
    from cluster.submit import submit  # with Ray

    outcome = submit(["python", "-m", module, *words], address, Path.cwd())
    sys.exit(outcome.exit_code)


def below_here(config: Path) -> str:
    """Returns the path of a configuration as a submitted job finds it; raises ConfigError where it will not."""
    root = Path.cwd()
    if not config.resolve().is_relative_to(root):
        raise ConfigError(f"{config}: must lie below {root}, which is what the cluster gets as working directory")
    return str(config.resolve().relative_to(root))


def check_exposed(words: Sequence[str], remedy: str) -> None:
    """Raises ConfigError where a word of a command line that is submitted holds a key."""
    if exposed := next(filter(holds_secrets, words), None):
        raise ConfigError(
            f"{without_secrets(exposed)!r}: it holds a key, which every user of the cluster could read in the list of "
            f"jobs; {remedy}"
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
