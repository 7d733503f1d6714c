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

import numpy as np
from mlflow import MlflowClient

from jobs.benchmark.tools.synthetic_experts import BASE, synthetic_expert, synthetic_null
from pipeline.config import RouterConfig
from pipeline.learning.replacing import replace_expert
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.registry import migration, promotion
from pipeline.registry.browsing import meant
from pipeline.registry.contents import experts_of
from pipeline.registry.evaluated_prompts import EvaluatedPrompts, has_prompts, keep_prompts
from pipeline.registry.experts import register_expert
from pipeline.registry.names import pool_name
from pipeline.registry.pools import register_pool
from pipeline.registry.scores import Score, log_scores, scores_of, tags_of
from pipeline.registry.strays import RoutedPrompt, Strays, keep_strays, strays_of
from pipeline.registry.successors import newest_with, open_pool, register_successor, retire_expert
from pipeline.registry.tracking import open_tracking, tracked_run
from pipeline.registry.versions import describe, version_at
from pipeline.routing import Pool

DIED = 9

WRITING = (
    "create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs", "log_inputs", "log_batch",
    "log_model_params", "create_registered_model", "create_model_version", "update_model_version", "set_logged_model_tags",
    "set_model_version_tag", "set_registered_model_tag", "set_registered_model_alias", "delete_model_version",
    "delete_logged_model",
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
    """Adds a third expert to the second pool, with its evaluation prompts, and lets the gate decide."""
    before = open_pool(newest_with(version_at(f"models:/{POOL}/2")))
    expert = synthetic_expert("third", 3, before.pool.base_fingerprint)
    with TemporaryDirectory() as scratch:
        version = register_expert(BASE.label, expert.save(Path(scratch) / "third"))
    if "third" in before.pool.names:
        made = before.version
    else:
        made = register_successor(before, before.pool.add(expert), ["added", "third"], experts=[version])
    if not has_prompts(version, "d"):
        features_NF = np.zeros((4, before.pool.width or 0), np.float32)
        rows = [f"row {number}" for number in range(4)]
        keep_prompts(version, "d", EvaluatedPrompts(rows, rows, [""] * 4, features_NF, np.ones(4), np.zeros(4)))
    scores = [*scores_of(version_at(f"models:/{POOL}/2")), Score("third", "d", 0.9, 0.1)]
    log_scores(run_id, made, scores)
    if strays_of(made) is None:
        keep_strays(made, {"third": Strays("d", "third", [RoutedPrompt("row 1", "row 1", "first")])})
    describe(made, tags=tags_of(scores), description="measured")
    promotion.decide(made, scores, gate=True, tolerance=0.02)


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
    for step in (register, promote, rollback, retire, add, replace, migrate)
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
