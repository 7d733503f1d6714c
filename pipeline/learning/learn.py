"""Learns a stream of tasks, one after the other, without forgetting: what the project is for.

For each task: train an expert and its routing vectors from this task's data alone, register it, make a new pool version,
evaluate the pool on all tasks seen and on the base abilities. Stopped at any moment, the same call goes on.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import mlflow

from cluster.usage import memory_bytes
from pipeline.errors import UserError
from pipeline.evaluation.matrix import AccuracyMatrix
from pipeline.evaluation.report import write_report
from pipeline.files import write_json
from pipeline.learning.catalog import Catalog
from pipeline.learning.changes import check_tasks
from pipeline.learning.evaluations import PoolEvaluations
from pipeline.learning.registering import registered_expert
from pipeline.learning.session import StreamSession
from pipeline.learning.state import Stopwatch
from pipeline.learning.summary import answers, learned, session_provenance
from pipeline.learning.trainings import Trainings, with_metrics
from pipeline.memory import trim_memory
from pipeline.provenance import now
from pipeline.registry.pools import register_pool
from pipeline.routing.pool import Pool


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
    catalog = Catalog(session, last.accuracies(), session.scored_rows)
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
        registered = registered_expert(session, task, trained)
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
            kept=f"pool and experts are safe in {session.output.run}; nothing will be trained again",
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
        session.output.keep()
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


def _upload(folder: Path, report: Path) -> None:
    mlflow.log_artifact(str(folder / "summary.json"))
    mlflow.log_artifact(str(report), "report")
    mlflow.log_artifacts(str(folder / "plots"), "report/plots")


def publish(session: StreamSession, summary: dict[str, Any]) -> Path:
    """Writes summary and report into the run's folder and as artifacts of the MLflow run; returns the report."""
    write_json(session.folder / "summary.json", summary)
    report = write_report(summary, session.folder)
    session.output.keep()
    session.retry(
        partial(_upload, session.folder, report),
        "uploading summary and report",
        kept=f"both are in {session.output.run}",
    )
    metrics = {key: value for key, value in summary["continual"].items() if value is not None}
    session.log_metrics([(f"continual/{key}", value, 0) for key, value in metrics.items()])
    return report
