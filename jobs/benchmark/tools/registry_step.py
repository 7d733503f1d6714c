"""One change of a registry in a process of its own, which dies before its n-th writing call to MLflow.

python -m jobs.benchmark.tools.registry_step sqlite:///runs/mlflow.db promote 1

Exit code: 9 where it died, 0 where it was done before.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient

from jobs.benchmark.tools.synthetic_experts import BASE, synthetic_expert
from pipeline.config import RouterConfig
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.registry import migration, promotion
from pipeline.registry.browsing import meant
from pipeline.registry.experts import register_expert
from pipeline.registry.names import pool_name
from pipeline.registry.pools import register_pool
from pipeline.registry.scores import Score, log_scores, tags_of
from pipeline.registry.successors import retire_expert
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
    pool = Pool(BASE.label, fingerprint(checkpoint(BASE)), RouterConfig(feature_width=128))
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


def migrate(run_id: str) -> None:
    """Migrates a registry of an earlier release."""
    list(migration.migrate("former"))


STEPS: dict[str, Callable[[str], None]] = {
    step.__name__: step for step in (register, promote, rollback, retire, migrate)
}


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
    uri, step, call = sys.argv[1:]
    experiment = open_tracking(uri, "pointsman")
    with tracked_run(experiment, step, step) as run:
        if int(call):
            _dying_before(int(call))
        STEPS[step](run)
