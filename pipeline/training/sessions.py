"""Training sessions side by side: each trains one training at a time, and its workers live on for the next."""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pipeline.config import TrainingConfig
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.storage.mirror import Folder
from pipeline.training.session import OnSteps, Session, TrainResult
from pipeline.training.spec import TrainSpec


class Sessions:
    """As many sessions as the cluster is to hold at a time; may be called from several threads."""

    def __init__(self, count: int, training: TrainingConfig, *, storage: Folder, worker_env: dict[str, str]) -> None:
        self._all = [Session(training, storage=storage, worker_env=worker_env) for _ in range(count)]
        # The one that trained last comes first: it has workers, others may never need any.
        self._free: queue.LifoQueue[Session] = queue.LifoQueue()
        for session in self._all:
            self._free.put(session)

    def start(self, expected: Sequence[TrainSpec]) -> None:
        """Starts the workers of the sessions that train first, one for each `expected` training; before any training."""
        for session, spec in zip(reversed(self._all), expected, strict=False):
            session.start(spec)

    def train(
        self, spec: TrainSpec, rows: TrainingRows, on_steps: OnSteps = lambda steps: None, **watched: Any
    ) -> TrainResult:
        """Trains a training in the first session that is free, as `Session.train` does."""
        session = self._free.get()
        try:
            return session.train(spec, rows, on_steps, **watched)
        finally:
            self._free.put(session)

    def close(self, *, at_once: bool = False) -> None:
        """Ends all sessions at a time, those that train only with `at_once`."""
        with ThreadPoolExecutor(len(self._all)) as pool:
            list(pool.map(partial(Session.close, at_once=at_once), self._all))
