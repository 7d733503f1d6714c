"""Evaluations of a stream's pools, one after each task: started when a pool is saved, recorded in the order of the tasks."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean

from mlflow.entities.model_registry import ModelVersion

from pipeline.evaluation.matrix import AccuracyMatrix
from pipeline.evaluation.results import Evaluation
from pipeline.learning.catalog import Catalog
from pipeline.learning.session import StreamSession
from pipeline.routing.pool import Pool


class PoolEvaluations:
    """Evaluates growing pools into an accuracy matrix, at most one at a time, while the next task is learned."""

    def __init__(self, session: StreamSession, matrix: AccuracyMatrix, catalog: Catalog) -> None:
        self._session, self._matrix, self._catalog = session, matrix, catalog
        self._benchmarks = [task.name for task in session.config.stream.benchmarks]
        self._waiting: tuple[Pool, tuple[ModelVersion, ModelVersion], Future[Evaluation]] | None = None
        self._last: Evaluation | None = None

    def begin(self, pool: Pool, key: str, folder: Path, version: ModelVersion, expert: ModelVersion) -> None:
        """Evaluates a pool on its tasks and on the base abilities, now or in the background; waits for the one before.

        `version` is the pool's in the registry, `expert` that of its newest expert.
        """
        self.end()
        going_on = self._session.evaluate_soon([*pool.names, *self._benchmarks], pool, key, folder=folder)
        self._waiting = pool, (version, expert), going_on
        if going_on.done():
            self.end()

    def end(self) -> Evaluation | None:
        """Waits for the running evaluation; returns the last one, or None."""
        if self._waiting is not None:
            (pool, (version, expert), going_on), self._waiting = self._waiting, None
            self._last = going_on.result()
            self._note(pool.names, self._last)
            self._catalog.show(version, pool, self._last, expert)
        return self._last

    def _note(self, names: Sequence[str], evaluation: Evaluation) -> None:
        accuracies = evaluation.accuracies()
        self._matrix.record(names[-1], accuracies)
        self._session.log_metrics([(f"accuracy/{column}", value, len(names)) for column, value in accuracies.items()])
        new, old = ([accuracies[name] for name in of] for of in (names, self._benchmarks))
        abilities = f", base abilities {fmean(old):.3f}" if old else ""
        self._session.progress.log(f"  with {names[-1]}: tasks so far {fmean(new):.3f}{abilities}")
