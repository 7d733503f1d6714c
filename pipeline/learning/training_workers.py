"""The training workers of a run: started once, and again where they were stopped to make room for others."""

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from cluster.deepspeed_ops import build_deepspeed_ops
from cluster.local import ClusterInfo
from pipeline.config import TrainingConfig
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.learning.capacity import Capacity
from pipeline.learning.progress import Progress
from pipeline.storage.mirror import Folder
from pipeline.training.session import OnSteps, TrainResult
from pipeline.training.sessions import Sessions
from pipeline.training.spec import TrainSpec

PREPARING = "preparing DeepSpeed (once on a machine, up to a minute)"


class TrainingWorkers:
    """As many sessions side by side as the cluster holds; trainings may be asked for from several threads."""

    def __init__(
        self,
        training: TrainingConfig,
        cluster: ClusterInfo,
        capacity: Capacity,
        progress: Progress,
        *,
        storage: Folder,
    ) -> None:
        self._training, self._cluster, self._capacity = training, cluster, capacity
        self._progress, self._storage = progress, storage
        self._sessions: Sessions | None = None
        self._lock = threading.Lock()
        self.closed = False
        """Whether nothing is to be trained any more."""

    @cached_property
    def env(self) -> dict[str, str]:
        """Environment variables of the workers; without GPUs, DeepSpeed's operator is compiled first, on every node."""
        if self._training.gpu:
            return {}
        if self._cluster.started:  # so it has been prepared
            return build_deepspeed_ops()
        with self._progress.working(PREPARING):
            return build_deepspeed_ops()

    def start(self, expected: Sequence[TrainSpec]) -> None:
        """Starts the workers of trainings that will begin soon, if inference fits beside them; returns at once."""
        if self._sessions is None and expected and self._capacity.side_by_side:
            self._sessions = self._new(self.env)
            self._sessions.start(expected)

    def train(self, spec: TrainSpec, rows: TrainingRows, on_steps: OnSteps, **watched: Any) -> TrainResult:
        """Trains, or resumes from the last checkpoint, as `Session.train` does."""
        env = self.env
        with self._lock:
            if self.closed:
                raise RuntimeError(f"{spec.task}: the run has ended")
            sessions = self._sessions = self._sessions or self._new(env)
        return sessions.train(spec, rows, on_steps, **watched)

    def _new(self, env: dict[str, str]) -> Sessions:
        return Sessions(self._capacity.trainings, self._training, storage=self._storage, worker_env=env)

    def end(self, *, at_once: bool = False) -> None:
        """Stops the workers, in the middle of a step if `at_once`; the next training starts new ones."""
        with self._lock:
            sessions, self._sessions = self._sessions, None
        if sessions is not None:
            sessions.close(at_once=at_once)

    def close(self) -> None:
        """Lets no further training begin."""
        with self._lock:
            self.closed = True
