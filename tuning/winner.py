"""What becomes of the best trial: a configuration that says it, a version of its expert in the registry."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities.model_registry import ModelVersion

from pipeline.config import ConfigError, LearnConfig, TaskConfig
from pipeline.config.loading import load_config, with_values
from pipeline.files import atomic_file
from pipeline.learning.session import StreamSession
from pipeline.provenance import command_line
from pipeline.registry.experts import register_expert
from pipeline.registry.versions import REGISTERED, describe
from pipeline.routing.store import ExpertReference
from tuning.results import Trial

CANDIDATE = "candidate"
"""Begin of the status of a version that a sweep has found and no pool has."""


def write_configuration(file: Path, trial: Trial, *, config: Path, settings: LearnConfig) -> None:
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
            staging.write_text(f"# The best of: {command_line()}\n{text}")
    except OSError as error:
        raise ConfigError(f"--apply {file}: cannot be written: {error.strerror}") from None
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


def register_winner(session: StreamSession, task: TaskConfig, trial: Trial) -> ModelVersion:
    """Registers the trial's expert as a candidate version, or finds it registered; pools and champions stay as they are."""
    digest = str(trial.metrics["expert"])
    folder = session.experts.ensure(session.reference(task.name, digest))
    expert = session.experts.load(ExpertReference(name=task.name, digest=digest))

    def register() -> ModelVersion:
        version = register_expert(session.config.base.label, folder, card=expert.card)
        if version.tags.get("status") == REGISTERED:  # no pool has it
            describe(version, tags={"status": f"{CANDIDATE}, {trial.metrics['accuracy']:.3f} in a sweep"})
        return version

    kept = f"the expert is safe in {folder}; the same command registers it"
    return session.retry(partial(register), f"registering expert {task.name}", kept=kept)
