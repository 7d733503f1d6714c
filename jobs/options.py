"""Options that jobs share: the configuration file, overrides, the cluster's address."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

import pipeline.config
from cluster.local import JOB_CONFIG
from cluster.submit import submit
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
    if JOB_CONFIG in os.environ and not Path(settings.output).is_absolute():
        settings = settings.model_copy(update={"output": str(Path.home() / "pointsman" / settings.output)})
        typer.echo(f"output goes to {settings.output}")
    return settings


def job_command(module: str, config: Path, overrides: list[str] | None, address: str, *more: str) -> NoReturn:
    """Submits a job to a cluster: the same module, configuration and overrides; ends with the job's exit code."""
    root = Path.cwd()
    if not config.resolve().is_relative_to(root):
        raise ConfigError(f"{config}: must lie below {root}, which is what the cluster gets as working directory")
    if exposed := next(filter(holds_secrets, [*(overrides or []), *more]), None):
        raise ConfigError(
            f"{without_secrets(exposed)!r}: it holds a key, which every user of the cluster could read in the list of "
            f"jobs; write it into {config}"
        )
    relative = config.resolve().relative_to(root)
    outcome = submit(["python", "-m", module, str(relative), *(overrides or []), *more], address, root)
    sys.exit(outcome.exit_code)


def fields_help(config_class: str) -> str:
    """Returns every field of a configuration class with its default and meaning, for `--help`."""
    fields: type[Config] = getattr(pipeline.config, config_class)
    lines = [
        "Fields of CONFIG. FIELD=VALUE overrides those that are not in a list ([]); `extends: other.yaml` takes the",
        "others from there. A source (train, eval, base_prompts) can be a plain path. Benchmarks are tasks without `train`.",
        "",
    ]
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
