"""Recomputes what routers know of each task's prompts, without training: the experts stay, a new pool stands beside the old."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic

from mlflow.entities.model_registry import ModelVersion

from pipeline.files import write_json
from pipeline.learning.changes import remember
from pipeline.learning.renewals import Renewal, plan
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import metrics_on_card, task_metrics
from pipeline.registry.experts import register_expert
from pipeline.registry.loading import download_pool
from pipeline.registry.pools import find_pool, register_pool
from pipeline.registry.promotion import CHAMPION
from pipeline.registry.versions import MODELS
from pipeline.routing.pool import CARD, Pool
from pipeline.routing.store import ExpertReference, StoredExpert
from pipeline.routing.trained import TrainedExpert, TrainedPool
from pipeline.training.recompute import recomputed


def recompute(session: StreamSession, old: TrainedPool, *, skip_missing: bool = False) -> ModelVersion:
    """Makes and registers the new pool of an old one; returns its version.

    What is missing is reported first. Then statistics are computed, expert by expert; nothing is registered before all are
    there.
    """
    began = monotonic()
    renewals = plan(session, old, skip_missing=skip_missing)
    experts, read = {}, 0
    for number, renewal in enumerate(renewals):
        session.progress.log(f"expert {number + 1}/{len(renewals)}: {renewal.task.name}", "bold")
        experts[renewal.task.name], prompts = _expert(session, old, renewal)
        read += prompts
    pool = Pool(session.config.base.label, session.fingerprint, session.config.router, **session.null_expert())
    if old.null and not pool.null:
        session.progress.log(
            "  the old pool had a null expert; without stream.base_prompts the new one abstains by distance"
        )
    pools = []
    for expert in experts.values():
        pool = pool.add(expert)
        pools.append(pool)
    key = session.pool_key(pool)
    new, before = session.folder / "recomputed" / f"pool-{key}", find_pool(pool.base_label, session.config.pool, key)
    version = session.retry(
        partial(_register, session, pools, experts, new),
        "registering experts and pool",
        kept="nothing is computed again",
    )
    outcome = "there already" if before else f"the old ones stay, and so does {CHAMPION}: `learn` lets the gate decide"
    session.progress.log(
        f"\n{len(experts)} of {len(old.experts)} experts, {read} prompts read in {monotonic() - began:.0f} s: version "
        f"{version.version} of {version.name} ({outcome}), in {session.output.shown(new)}"
    )
    return version


def _expert(session: StreamSession, old: TrainedPool, renewal: Renewal) -> tuple[StoredExpert, int]:
    """Returns an expert with its new statistics, in the run's store, and how many prompts were read for them now."""
    task = renewal.task
    if renewal.identity is None:
        session.progress.log("  has these statistics already")
        folder = old.folder_of(task.name)
        return _stored(session, session.experts.take(ExpertReference.of(folder), folder)), 0
    wanted = session.reference(task.name, renewal.digest)
    if renewal.changes:
        session.progress.log(f"  trained otherwise than the configuration says, and kept: {'; '.join(renewal.changes)}")
    if session.has_expert(wanted):
        session.progress.log("  recomputed before")
        return _stored(session, session.experts.ensure(wanted)), 0
    began, trained = monotonic(), old.expert(task.name)
    with session.progress.working(f"reading {task.name}"):
        rows = session.data.training_rows(task)
    session.data.tell_set_aside(task.name, rows.aside[task.name], "train")
    with session.progress.working("taking statistics of its prompts"):
        expert = recomputed(
            trained,
            rows.training_rows([task.name]),
            session.config.base,
            session.config.router,
            identity=renewal.identity,
            seed=session.config.seed,
            targets=session.config.expert.target_modules,
            workers=session.capacity.inference,
            vision=session.data.vision,
        )
    aside = rows.aside[task.name]
    counts = {"rows": rows.counts[task.name], "quarantined": aside.rows, "lost_files": aside.files}
    _keep_metrics(session, trained, renewal.digest, counts)
    folder = session.experts.put(expert)
    session.data.release(task)
    session.progress.log(f"  {expert.statistics.count} prompts in {monotonic() - began:.0f} s")
    return _stored(session, folder), expert.statistics.count


def _stored(session: StreamSession, folder: Path) -> StoredExpert:
    return StoredExpert(ExpertReference.of(folder), session.experts)


def _keep_metrics(session: StreamSession, trained: TrainedExpert, key: str, counts: Mapping[str, int]) -> None:
    """Writes what `learn` needs to take the expert for learned: the metrics of its training, or what its card has of them."""
    card = trained.card
    before, now = (session.folder / "state" / f"task-{name}.json" for name in (card.config_digest, key))
    if before.exists():
        shutil.copyfile(before, now)
        return
    metrics = {**metrics_on_card(card), **counts}
    write_json(now, task_metrics(session, card.task, metrics))


def _register(
    session: StreamSession, pools: Sequence[Pool], experts: Mapping[str, StoredExpert], new: Path
) -> ModelVersion:
    """Registers all experts, then the pools of the first of them, of the first two, ..., as learning does.

    So `learn` finds each of them. The last is written to `new`; returns its version.
    """
    label = session.config.base.label
    versions = {name: register_expert(label, session.experts.ensure(e.reference)) for name, e in experts.items()}
    for pool in pools:
        remember(session, pool.experts[pool.names[-1]].card)
        versions_of_pool = {name: versions[name] for name in pool.names}
        version = register_pool(
            pool,
            session.config.base,
            name=session.config.pool,
            digest=session.pool_key(pool),
            experts=versions_of_pool,
            expert_memory=session.config.evaluation.expert_memory,
        )
    pools[-1].save(new)
    return version


def pool_to_renew(session: StreamSession, pool: str | None, scratch: Path) -> TrainedPool:
    """Returns the pool at an address (None: the run's own, else the champion), copied to `scratch` if the registry has it."""
    own_pool = session.folder / "pool"
    if pool is None and not (own_pool / CARD).is_file():
        pool = f"{MODELS}{session.pool_model}@{CHAMPION}"
    if pool is None or not pool.startswith(MODELS):
        folder = own_pool if pool is None else Path(pool).expanduser().resolve()
        session.progress.log(f"pool {folder}")
        return TrainedPool.load(folder, session.experts if pool is None else None)
    session.progress.log(f"pool {pool}")
    return TrainedPool.load(session.retry(partial(download_pool, pool, scratch), f"fetching {pool}"), session.experts)
