"""The best trial as a configuration. Nothing heavy is imported: where it cannot be written is said before anything starts."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import ConfigError, LearnConfig
from pipeline.config.loading import load_config, with_values
from pipeline.files import atomic_file
from pipeline.provenance import command_line

if TYPE_CHECKING:
    from tuning.results import Trial

MARK = "# The best of: "
"""How a file begins that a sweep has written, and that the next one may replace."""


def check_file(file: Path) -> None:
    """Raises ConfigError where the winner could not be written to `file`, or would replace what no sweep has written."""
    try:
        if file.exists() and not file.read_text(errors="replace").startswith(MARK):
            raise ConfigError(
                f"--apply {file}: there is a file of that name that no sweep has written; name another one, or remove it"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--apply {file}: cannot be written: {error.strerror}")


def write_configuration(file: Path, trial: "Trial", *, config: Path, settings: LearnConfig) -> None:
    """Writes a configuration that extends the sweep's own `config` by its overrides and the trial's values.

    `settings` are those of the sweep, with overrides. Raises ConfigError where the file cannot be written, or would say
    something else than the trial.
    """
    own = load_config(config, [], LearnConfig).model_dump(mode="json")
    wanted = with_values(settings, trial.point, "the winner")
    changed = _changes(own, wanted.model_dump(mode="json"))
    values = {"extends": os.path.relpath(config.resolve(), file.resolve().parent), **changed}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        with atomic_file(file) as staging:
            staging.write_text(f"{MARK}{command_line()}\n{text}")
    except OSError as error:
        raise _unwritable(file, error) from None
    if load_config(file, [], LearnConfig) != wanted:
        raise ConfigError(f"--apply {file}: does not say the winner; its values are in the sweep's summary.json")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that differ, in their groups; lists as a whole."""
    changed = {}
    for name, value in now.items():
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping):
            if inner := _changes(before[name], value):
                changed[name] = inner
        elif value != before.get(name):
            changed[name] = value
    return changed
