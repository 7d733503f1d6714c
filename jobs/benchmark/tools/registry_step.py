"""One change of a registry in a process of its own, which dies before its n-th writing call to MLflow.

MLFLOW_TRACKING_URI=sqlite:///runs/mlflow.db python -m jobs.benchmark.tools.registry_step promote 1

Exit code: 9 where it died, 0 where it was done before.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from jobs.benchmark.tools.ended_session import ended_session, tell
from jobs.benchmark.tools.synthetic_experts import BASE, synthetic_expert, synthetic_null
from pipeline.config import RouterConfig
from pipeline.learning.adding import join_pool
from pipeline.learning.registering import RegisteredExpert, register_trained
from pipeline.learning.replacing import replace_expert
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.registry import migration, promotion
from pipeline.registry.browsing import meant
from pipeline.registry.contents import experts_of
from pipeline.registry.experts import register_expert, registered_experts
from pipeline.registry.names import pool_name
from pipeline.registry.pools import register_pool
from pipeline.registry.scores import Score, log_scores, tags_of
from pipeline.registry.successors import open_pool, register_successor, retire_expert
from pipeline.registry.tracking import open_tracking, tracked_run
from pipeline.registry.versions import describe, version_at, versions_of
from pipeline.routing import Expert, Pool
from pipeline.routing.store import ExpertReference, StoredExpert

DIED = 9

WRITING = (
    "create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs", "log_inputs", "log_batch",
    "log_model_params", "create_registered_model", "create_model_version", "update_model_version", "set_logged_model_tags",
    "set_model_version_tag", "set_registered_model_tag", "set_registered_model_alias", "delete_model_version",
    "delete_logged_model", "delete_logged_model_tag",
)  # fmt: skip
"""Calls of MLflow's client that change the registry."""

POOL = pool_name(BASE.label, "faults")


def register(run_id: str) -> None:
    """Registers two experts, the pool of the first and the pool of both, each with its scores."""
    pool = Pool(BASE.label, fingerprint(checkpoint(BASE)), RouterConfig(feature_width=128), null=synthetic_null())
    versions = {}
    for number, name in enumerate(("first", "second"), start=1):
        expert = synthetic_expert(name, number, pool.base_fingerprint)
        with TemporaryDirectory() as scratch:
            versions[name] = register_expert(BASE.label, expert.save(Path(scratch) / name))
        pool = pool.add(expert)
        made = register_pool(pool, BASE, name="faults", digest=f"pool-{number}", experts=versions)
        scores = [Score(each, "d", 0.9, 0.1) for each in pool.names] + [Score("shape", "s", 0.8, 0.8, ability=True)]
        log_scores(run_id, made, scores)
        describe(made, tags=tags_of(scores), description="measured")


def promote(run_id: str) -> None:
    """Promotes both pools, one after the other."""
    for number in (1, 2):
        promotion.promote(POOL, number)


def retire(run_id: str) -> None:
    """Retires an expert of the second pool and promotes what is left."""
    before = version_at(f"models:/{POOL}/2")
    now = retire_expert(before, "first")
    promotion.promote(POOL, str(now.version))


def rollback(run_id: str) -> None:
    """Goes back to the first pool; told to do so again, it stays."""
    if int(meant(POOL).version) != 1:
        promotion.rollback(POOL)


def add(run_id: str) -> None:
    """Adds a third expert to the pool in use as `pointsman add` and `registry import` do, and lets the gate decide."""
    _add(run_id, "third", 3, meant(POOL))


def add_meanwhile(run_id: str) -> None:
    """Adds a fourth expert to the pool without the third, as one does who has read the pool before that was there."""
    before = open_pool(version_at(f"models:/{POOL}/3"))
    expert = synthetic_expert("fourth", 4, before.pool.base_fingerprint)
    version = _registered(run_id, expert)
    register_successor(
        before, before.pool.add(expert), ["added", "fourth", expert.card.config_digest], experts=[version]
    )
    _add(run_id, "fourth", 4, before.version)
    newest = versions_of(POOL)[0]
    assert {"third", "fourth"} < experts_of(newest).keys(), "both are in the newest"


def _add(run_id: str, task: str, seed: int, start: ModelVersion) -> None:
    expert = synthetic_expert(task, seed, fingerprint(checkpoint(BASE)))
    version, store = _registered(run_id, expert), registered_experts()
    session = _session(run_id, expert)
    stored = StoredExpert(ExpertReference.of(store.put(expert)), store)
    registered = RegisteredExpert(stored.registered_as(version.name, int(version.version)), version, {})
    made, _ = join_pool(session, start, registered, replaces=False)
    tell(session, made, open_pool(made).pool, version)


def _registered(run_id: str, expert: Expert) -> ModelVersion:
    (task,) = _session(run_id, expert).config.stream.tasks
    with TemporaryDirectory() as scratch:
        folder = expert.save(Path(scratch) / task.name)
        return register_trained(_session(run_id, expert), task, expert.card, folder, {"rows": 1000})


def _session(run_id: str, expert: Expert) -> Any:
    experiment = MlflowClient().get_run(run_id).info.experiment_id
    return ended_session(expert.card.task, expert.card.config_digest, "faults", experiment, run_id)


def replace(experiment: str) -> None:
    """Puts another training of an expert in its place, in a run that this opens itself."""
    again = synthetic_expert("second", 22, fingerprint(checkpoint(BASE)))
    with TemporaryDirectory() as scratch, tracked_run(experiment, "training", "training"):
        version = register_expert(BASE.label, again.save(Path(scratch) / "second"))
    pool = meant(POOL)
    if experts_of(pool)["second"] != f"{version.name}/{version.version}":
        replace_expert(pool, version, force=True)


def migrate(run_id: str) -> None:
    """Migrates a registry of an earlier release."""
    list(migration.migrate("former"))


def _in_run(step: Callable[[str], None]) -> Callable[[str], None]:
    """Returns the step in a run of its name."""

    def run(experiment: str) -> None:
        with tracked_run(experiment, step.__name__, step.__name__) as run_id:
            step(run_id)

    return run


STEPS: dict[str, Callable[[str], None]] = {
    step.__name__: step if step is replace else _in_run(step)
    for step in (register, promote, rollback, retire, add, add_meanwhile, replace, migrate)
}
"""Each takes the id of MLflow's experiment."""


def _dying_before(call: int) -> None:
    """Makes this process die, as by SIGKILL, before its `call`-th writing call."""
    left = [call]

    def mortal(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **settings: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(DIED)
            return original(*arguments, **settings)

        return called

    for name in WRITING:
        setattr(MlflowClient, name, mortal(getattr(MlflowClient, name)))


if __name__ == "__main__":
    step, call = sys.argv[1:]
    experiment = open_tracking(os.environ["MLFLOW_TRACKING_URI"], "pointsman")
    if int(call):
        _dying_before(int(call))
    STEPS[step](experiment)
