"""Registers the expert of a task once it is trained."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities.model_registry import ModelVersion

from pipeline.config import TaskConfig
from pipeline.learning.changes import remember
from pipeline.learning.session import StreamSession
from pipeline.learning.state import read_json
from pipeline.learning.trainings import TrainedExpert
from pipeline.registry.experts import register_expert, take_up_expert
from pipeline.registry.tracking import log_dataset
from pipeline.routing.expert import ExpertCard
from pipeline.routing.store import ExpertReference, StoredExpert


class RegisteredExpert(NamedTuple):
    """A registered expert, ready for the pool."""

    expert: StoredExpert
    version: ModelVersion
    metrics: dict[str, Any]


def registered_expert(session: StreamSession, task: TaskConfig, trained: TrainedExpert) -> RegisteredExpert:
    """Registers a task's expert, unless it is registered already."""
    metrics, folder = read_json(trained.file), session.experts.ensure(trained.reference)
    session.output.keep_expert(trained.reference)
    expert = StoredExpert(ExpertReference.of(folder), session.experts)
    version = session.retry(
        partial(register_trained, session, task, expert.expert.card, folder, metrics),
        f"registering expert {task.name}",
        kept=f"the trained expert is safe in {folder}; it will not be trained again",
    )
    if trained.before:
        session.progress.log(f"  learned before, version {version.version} of {version.name}")
    remember(session, expert.expert.card)
    return RegisteredExpert(expert.registered_as(version.name, int(version.version)), version, metrics)


def register_trained(
    session: StreamSession, task: TaskConfig, card: ExpertCard, folder: Path, metrics: Mapping[str, Any]
) -> ModelVersion:
    """Returns the registry version of a trained expert; creates it if there is none."""
    label = session.config.base.label
    if (version := take_up_expert(label, card.task, card.config_digest)) is not None:
        return version
    if "rows" in metrics:  # which earlier releases did not write down
        assert task.train is not None
        log_dataset(session.mlflow_run_id, task.name, task.train.path, card.data_fingerprint, samples=metrics["rows"])
    return register_expert(label, folder, card=card, rows=metrics.get("rows"))
