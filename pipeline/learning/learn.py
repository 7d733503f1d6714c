"""Learns a stream of tasks, one after the other, without forgetting: what the project is for.

For each task: train an expert and its routing vectors from this task's data alone, register it, make a new pool version,
evaluate the pool on all tasks seen and on the base abilities. Stopped at any moment, the same call goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import mlflow
from mlflow.entities.model_registry import ModelVersion

from cluster.usage import memory_bytes
from pipeline.config import TaskConfig
from pipeline.errors import UserError
from pipeline.evaluation.matrix import AccuracyMatrix
from pipeline.evaluation.report import write_report
from pipeline.files import write_json
from pipeline.learning.catalog import Catalog
from pipeline.learning.changes import check_tasks, remember
from pipeline.learning.evaluations import PoolEvaluations
from pipeline.learning.session import StreamSession
from pipeline.learning.state import Stopwatch, read_json
from pipeline.learning.summary import answers, learned, session_provenance
from pipeline.learning.trainings import TrainedExpert, Trainings, with_metrics
from pipeline.memory import trim_memory
from pipeline.provenance import now
from pipeline.registry.experts import find_expert, register_expert
from pipeline.registry.pools import register_pool
from pipeline.registry.tracking import log_dataset
from pipeline.routing.expert import ExpertCard
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference, StoredExpert


@dataclass(frozen=True)
class LearnResult:
    """A stream that has been learned."""

    pool: Pool
    pool_folder: Path
    pool_digest: str
    summary: dict[str, Any]


def learn_stream(session: StreamSession) -> LearnResult:
    """Learns all tasks of the stream; finished tasks are found and skipped."""
    check_tasks(session)
    config, started = session.config, now()
    watch = Stopwatch(session.folder / "state" / "clock.json")
    names = [task.name for task in config.stream.tasks]
    benchmarks = [task.name for task in config.stream.benchmarks]
    matrix, trainings = AccuracyMatrix(names, benchmarks), Trainings(session)
    trainings.start_workers()
    pool = Pool(config.base.label, session.fingerprint, config.router, **session.null_expert())
    pool_folder, metrics, versions = session.folder / "pool", {}, {}
    last = session.evaluate([*names, *benchmarks], None, "base", who="the base")
    matrix.record("base", last.accuracies())
    catalog = Catalog(session, last)
    evaluations = PoolEvaluations(session, matrix, catalog)
    for number, task in enumerate(config.stream.tasks):
        session.progress.log(f"task {number + 1}/{len(names)}: {task.name}", "bold")
        began = monotonic()
        try:
            trained = trainings.expert(task)
        except UserError:
            evaluations.end()  # of the pool before, which is whole
            raise
        ended = monotonic()
        registered = _registered(session, task, trained)
        versions[task.name], metrics[task.name] = registered.version, registered.metrics
        pool = pool.add(registered.expert)
        pool.save(pool_folder)
        pool_key = session.pool_key(pool)
        version = session.retry(
            partial(
                register_pool,
                pool,
                config.base,
                name=config.pool,
                digest=pool_key,
                experts=dict(versions),
                expert_memory=config.evaluation.expert_memory,
            ),
            "registering the pool",
            kept=f"pool and experts are safe in {session.folder}; nothing will be trained again",
        )
        if not trained.before:
            beyond = metrics[task.name]["seconds"] - metrics[task.name]["step_seconds"]
            overhead = {"overhead_seconds": beyond + monotonic() - ended}
            metrics[task.name] = with_metrics(trained.file, metrics[task.name], overhead)
        seconds = metrics[task.name]["seconds"]
        session.progress.log(f"  pool version {version.version}   ({seconds:.0f} s to learn)")
        if config.is_evaluated(number + 1):
            evaluations.begin(pool, pool_key, pool_folder, version, versions[task.name])
        if not trained.before:
            trim_memory()
            turn = {"turn_seconds": monotonic() - began, "memory_bytes": memory_bytes()}
            metrics[task.name] = with_metrics(trained.file, metrics[task.name], turn)
        watch.lap()
    if evaluations.end() is not None:  # with samples now
        last = session.evaluate([*names, *benchmarks], pool, pool_key, folder=pool_folder, quietly=True)
        catalog.close(version, pool, last, versions, metrics)
    summary = {
        **session_provenance(session, started),
        "seconds_total": watch.stop(),
        "peak_memory_bytes": session.peak_memory(),
        **learned(session, matrix, last, metrics),
        "answers": answers(last, names, session.generated.count),
    }
    return LearnResult(pool, pool_folder, pool_key, summary)


class _Registered(NamedTuple):
    """A registered expert, ready for the pool."""

    expert: StoredExpert
    version: ModelVersion
    metrics: dict[str, Any]


def _registered(session: StreamSession, task: TaskConfig, trained: TrainedExpert) -> _Registered:
    """Registers a task's expert, unless it is registered already."""
    metrics, folder = read_json(trained.file), session.experts.ensure(trained.reference)
    expert = StoredExpert(ExpertReference.of(folder), session.experts)
    version = session.retry(
        partial(_register, session, task, expert.expert.card, folder, metrics),
        f"registering expert {task.name}",
        kept=f"the trained expert is safe in {folder}; it will not be trained again",
    )
    if trained.before:
        session.progress.log(f"  learned before, version {version.version} of {version.name}")
    remember(session, expert.expert.card)
    return _Registered(expert.registered_as(version.name, int(version.version)), version, metrics)


def _register(
    session: StreamSession, task: TaskConfig, card: ExpertCard, folder: Path, metrics: Mapping[str, Any]
) -> ModelVersion:
    """Returns the registry version of a trained expert; creates it if there is none."""
    label = session.config.base.label
    if (version := find_expert(label, card.task, card.config_digest)) is not None:
        return version
    if "rows" in metrics:  # which earlier releases did not write down
        assert task.train is not None
        log_dataset(session.mlflow_run_id, task.name, task.train.path, card.data_fingerprint, samples=metrics["rows"])
    return register_expert(label, folder, card=card, rows=metrics.get("rows"))


def _upload(folder: Path, report: Path) -> None:
    mlflow.log_artifact(str(folder / "summary.json"))
    mlflow.log_artifact(str(report), "report")
    mlflow.log_artifacts(str(folder / "plots"), "report/plots")


def publish(session: StreamSession, summary: dict[str, Any]) -> Path:
    """Writes summary and report into the run's folder and as artifacts of the MLflow run; returns the report."""
    write_json(session.folder / "summary.json", summary)
    report = write_report(summary, session.folder)
    session.retry(
        partial(_upload, session.folder, report), "uploading summary and report", kept=f"both are in {session.folder}"
    )
    metrics = {key: value for key, value in summary["continual"].items() if value is not None}
    session.log_metrics([(f"continual/{key}", value, 0) for key, value in metrics.items()])
    return report
