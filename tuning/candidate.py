"""What becomes of the best trial in the registry: a version of its expert that no pool has yet."""

from functools import partial

from mlflow.entities.model_registry import ModelVersion

from pipeline.config import TaskConfig
from pipeline.learning.session import StreamSession
from pipeline.registry.experts import register_expert
from pipeline.registry.versions import REGISTERED, describe
from pipeline.routing.store import ExpertReference
from tuning.results import Trial

CANDIDATE = "candidate"
"""Begin of the status of a version that a sweep has found and no pool has."""


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
