"""A training session: Ray Train's workers, which live through a stream of tasks, as the driver sees them.

Starting workers, importing, loading and sharding the base are paid once; each task then costs its own steps. Workers that
die are started again and go on at the training's last checkpoint.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import json_logs
from pipeline.config import TrainingConfig
from pipeline.data.loading.training_rows import TrainingRows, held_out
from pipeline.errors import UserError
from pipeline.routing.adapters import REMEDY, ExpertError
from pipeline.storage.mirror import Folder, Mirror
from pipeline.storage.remote import StorageError
from pipeline.training.failures import Failures
from pipeline.training.spec import TrainSpec
from pipeline.training.telemetry import Step, receiving_steps
from pipeline.training.training_folder import ADAPTER, EXPERT, begun_anew, training_folder
from pipeline.training.training_queue import TrainingQueue
from pipeline.training.worker import ALREADY_FINISHED, GIVEN_UP, train

FEWEST_ROWS = 4
"""Rows that suffice for the spread of a task's prompts."""

RUN_PREFIX = "session-"
"""How the folders begin in which Ray Train keeps notes of a session's run."""

PATIENCE = 30.0
"""Seconds for which closing a session waits for its workers."""

WATCH_SECONDS = 0.2
"""Seconds between two looks at a training that goes on."""

OnSteps = Callable[[list[Step]], None]


class TrainingError(UserError):
    """A task that could not be trained; nothing was added to the pool."""


class TrainingGivenUp(Exception):
    """A training that nobody wanted any more; it can go on from its last checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    folder: Path
    """Folder of what came out."""
    metrics: dict[str, Any]
    """Losses by step, seconds and data wait of both stages, samples."""
    already_finished: bool = False
    """Whether it was finished before: then its steps were not reported."""

    @property
    def expert(self) -> Path:
        """Folder of the finished expert (adapter, routing vectors, statistics, card)."""
        return self.folder / EXPERT

    @property
    def adapter(self) -> Path:
        """Folder of the finished adapter, where there was no router stage."""
        return self.folder / ADAPTER


def finished_training(storage: Folder, task: str, digest: str) -> TrainResult | None:
    """Returns the result of a training that was finished before, None if it was not."""
    folder = training_folder(storage, task, digest)
    metrics = folder.metrics()
    return None if metrics is None else TrainResult(folder.finished, metrics, already_finished=True)


class Session:
    """Trains training after training on the same workers, which start with the first one, or with `start` before it."""

    def __init__(self, training: TrainingConfig, *, storage: Folder, worker_env: dict[str, str] | None = None) -> None:
        self.training, self._storage, self._env = training, Mirror.of(storage), worker_env or {}
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        self._error = ""
        """Why the workers' run has ended; as text, since the error's traceback would keep Ray Train's controller alive."""

    def start(self, expected: TrainSpec | None = None) -> None:
        """Starts the workers; returns at once, and they wait for their first training.

        Where that is `expected` to be on a certain base, they load it meanwhile.
        """
        self._error = ""
        # Beside the driver, as Ray Train's controller: what does not outlive the driver need not outlive a node either.
        node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._queue = ray.remote(num_cpus=0, label_selector=node)(TrainingQueue).remote(self.training.max_failures)
        self._thread = threading.Thread(
            target=self._run, args=(self._queue, expected), name="training session", daemon=True
        )
        self._thread.start()

    def train(
        self,
        spec: TrainSpec,
        rows: TrainingRows,
        on_steps: OnSteps = lambda steps: None,
        *,
        every: float = 1.0,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> TrainResult:
        """Trains `spec` on encoded rows; a training of the same task and digest goes on where it stopped, or is found finished.

        `on_steps` hears of its steps every `every` seconds. Where `is_wanted` turns false, a training with held-out rows ends
        at its next validation with TrainingGivenUp. Raises TrainingError when the loss diverges, the expert learned nothing, or
        workers keep dying.
        """
        if spec.training != self.training:
            raise ValueError("a session's workers are those of its first training: open another one for other workers")
        if (finished := finished_training(self._storage, spec.task, spec.digest)) is not None:
            return finished
        _check(spec, rows)
        with _as_training_error(spec.task):
            number = self._put(spec, rows)
            with receiving_steps(on_steps, self._queue, every=every):
                metrics = self._outcome(number, is_wanted)
        if metrics.get(GIVEN_UP):
            raise TrainingGivenUp(spec.task)
        if "failure" in metrics:
            raise TrainingError(f"task {spec.task!r}: {metrics['failure']}")
        already_finished = metrics.pop(ALREADY_FINISHED, False)
        folder = training_folder(self._storage, spec.task, spec.digest)
        folder.metrics()  # which brings here what the workers have uploaded
        return TrainResult(folder.finished, metrics, already_finished=already_finished)

    def close(self, *, at_once: bool = False) -> None:
        """Sends the workers home; those that train only with `at_once`: their last checkpoint stays."""
        if self._queue is None or self._thread is None:
            return
        with suppress(RayError):
            ray.get(self._queue.close.remote(), timeout=PATIENCE)
            for worker in ray.get(self._queue.workers.remote(), timeout=PATIENCE) if at_once else ():
                ray.kill(worker)
        self._thread.join(PATIENCE)
        self._queue = self._thread = None

    def _put(self, spec: TrainSpec, rows: TrainingRows) -> int:
        """Hands a training to the workers; to new ones where there are none, or where they failed too often before."""
        number, boxed = None, [ray.put(rows)]
        if self._thread is not None and self._thread.is_alive():
            number = ray.get(self._queue.put.remote(spec.model_dump(), boxed))
        if number is None:
            self.close()
            self.start()
            number = ray.get(self._queue.put.remote(spec.model_dump(), boxed))
        return number

    def _run(self, queue: Any, expected: TrainSpec | None) -> None:
        training, name = self.training, f"{RUN_PREFIX}{uuid4().hex[:8]}"
        trainer = TorchTrainer(
            train,
            train_loop_config={
                "queue": queue,
                "storage": self._storage,
                "expected": None if expected is None else expected.model_dump(),
            },
            torch_config=TorchConfig(backend="nccl" if training.gpu else "gloo"),
            scaling_config=scaling(training),
            run_config=RunConfig(
                name=name,
                storage_path=self._storage.path,
                storage_filesystem=None if self._storage.remote is None else self._storage.filesystem,
                # Without end: failures are counted by training, and the queue says when there were too many.
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[Failures(queue)],
                worker_runtime_env={"env_vars": thread_variables(training) | self._env},
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - raised where the training is waited for
            self._error = str(error) or type(error).__name__
        finally:
            with suppress(StorageError):
                self._storage.delete(name)  # what Ray Train notes of a run

    def _outcome(self, number: int, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Waits for a training's end."""
        assert self._thread is not None, "started before the training was put"
        outcome, given_up = self._queue.outcome.remote(number), False
        while True:
            ended = not self._thread.is_alive()
            if ray.wait([outcome], timeout=WATCH_SECONDS)[0]:
                return ray.get(outcome)
            if not given_up and not is_wanted():
                given_up = True
                self._queue.give_up.remote(number)
            if ended:
                return {"failure": f"training ended: {self._error}"}


@contextmanager
def training_session(
    training: TrainingConfig, *, storage: Folder, worker_env: dict[str, str] | None = None
) -> Iterator[Session]:
    """Yields a session and closes it; `storage` is a folder that all nodes see."""
    session = Session(training, storage=storage, worker_env=worker_env)
    try:
        yield session
    except BaseException:
        session.close(at_once=True)
        raise
    session.close()


def run_training(
    spec: TrainSpec,
    rows: TrainingRows,
    *,
    storage: Folder,
    on_steps: OnSteps = lambda steps: None,
    worker_env: dict[str, str] | None = None,
) -> TrainResult:
    """Trains one training in a session of its own."""
    with training_session(spec.training, storage=storage, worker_env=worker_env) as session:
        return session.train(spec, rows, on_steps)


def _check(spec: TrainSpec, rows: TrainingRows) -> None:
    held, workers = held_out(rows.count, spec.validation) if spec.validation else 0, spec.training.workers
    learned = rows.count - held
    which = f"{rows.count} rows" + (f", {held} of them held out," if held else "")
    if learned < workers or 0 < held < workers:
        raise TrainingError(f"task {spec.task!r}: {which} cannot be split among {workers} workers")
    if spec.router_stage and learned < FEWEST_ROWS:
        raise TrainingError(
            f"task {spec.task!r}: {which} are too few for its statistics; at least {FEWEST_ROWS} are needed: bring more rows"
            + (", or lower the task's `validation`" if held else "")
        )


@contextmanager
def reading_result(task: str, result: TrainResult) -> Iterator[None]:
    """Turns an ExpertError about damaged files of a finished training into a TrainingError with the remedy: train again."""
    try:
        yield
    except ExpertError as error:
        reason = str(error).removesuffix(f"; {REMEDY}")
        raise TrainingError(f"task {task!r}: {reason}; {begun_anew(result.folder)}") from None


@contextmanager
def _as_training_error(task: str) -> Iterator[None]:
    try:
        yield
    except (RayError, TrainingFailedError) as error:
        raise TrainingError(f"task {task!r}: training failed: {error}") from error


def scaling(training: TrainingConfig) -> ScalingConfig:
    """Returns the workers and what each of them holds: its threads' CPUs, and exactly one GPU where there are any."""
    resources: dict[str, float] = {"CPU": training.cpus_per_worker}
    if training.gpu:
        resources["GPU"] = 1
    return ScalingConfig(
        num_workers=training.workers,
        use_gpu=training.gpu,
        resources_per_worker=resources,
        accelerator_type=training.accelerator_type,
        label_selector=training.label_selector or None,
        placement_strategy=training.placement_strategy,
    )


def thread_variables(training: TrainingConfig) -> dict[str, str]:
    """Returns the worker's environment; Ray would set one thread a process where this is silent."""
    return {
        "OMP_NUM_THREADS": str(training.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cuda" if training.gpu else "cpu",
        **{name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR", json_logs.VARIABLE) if name in os.environ},
    }
