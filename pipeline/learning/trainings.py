"""The trainings of a stream: one task after the other, or several at the same time where the cluster has room."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.config import TaskConfig
from pipeline.data.errors import StreamError
from pipeline.files import write_json
from pipeline.learning.background import begin
from pipeline.learning.changes import expert_wanted
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import metrics_on_card, task_metrics
from pipeline.routing.foreign_config import ForeignAdapterError
from pipeline.routing.store import ExpertReference
from pipeline.training.session import reading_result


@dataclass(frozen=True)
class TrainedExpert:
    """A task's expert in the store, registered or not."""

    reference: ExpertReference
    file: Path
    """File with its metrics."""
    before: bool
    """Whether it was learned before."""


class Trainings:
    """Finds or trains the experts of a stream's tasks in its order, `capacity.trainings` at the same time.

    Where there is room they go on while the experts before them are registered and evaluated; after an error none begins.
    """

    def __init__(self, session: StreamSession) -> None:
        self._session, self._tasks = session, list(session.config.stream.tasks)
        self._begun: dict[str, Future[TrainedExpert]] = {}
        self._next = self._running = self._wanted = 0
        self._failed, self._lock = False, threading.RLock()

    def start_workers(self) -> None:
        """Starts the workers of the first trainings and reads their rows: both can go on while the base is evaluated."""
        session = self._session
        new = (t for t in self._tasks if _to_be_trained(session, t) and not session.is_learned(t))
        first = list(islice(new, session.capacity.trainings))
        session.start_workers([session.spec_alone(task, session.identity.expert(task)) for task in first])
        for task in first:
            session.data.read_ahead(task)

    def expert(self, task: TaskConfig) -> TrainedExpert:
        """Waits for a task's training and returns its expert; raises the error of the training."""
        with self._lock:
            self._wanted = self._tasks.index(task) + self._session.capacity.trainings
            self._begin()
        return self._begun.pop(task.name).result()

    def _begin(self) -> None:
        """Starts the next trainings in order, as many as there is room for."""
        at_once = self._session.capacity.trainings
        end = len(self._tasks) if self._session.capacity.ahead else min(self._wanted, len(self._tasks))
        while self._next < end and self._running < at_once and not self._failed:
            task, self._next, self._running = self._tasks[self._next], self._next + 1, self._running + 1
            following = next(iter(self._tasks[self._next + at_once - 1 :]), None)
            training = partial(_found_or_trained, self._session, task, following)
            self._begun[task.name] = begin(training, name=f"training {task.name}")
            self._begun[task.name].add_done_callback(partial(self._ended, task.name))

    def _ended(self, name: str, done: Future[TrainedExpert]) -> None:
        with self._lock:
            self._running -= 1
            if (error := done.exception()) is not None:
                self._failed = True
                if name in self._begun and not self._session.closed:  # others come first
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    self._session.progress.log(f"  {name} has failed; the run ends when its turn comes: {reason}")
            self._begin()


def _found_or_trained(session: StreamSession, task: TaskConfig, following: TaskConfig | None) -> TrainedExpert:
    """Returns a task's expert: trained before by this run or another one, or trained now.

    While it trains the rows of the `following` task are read, which its workers will train next, if it is to be trained too.
    """
    started = monotonic()
    wanted = session.reference(task.name, expert_wanted(session, task))
    file = session.folder / "state" / f"task-{wanted.digest}.json"
    assert wanted.digest is not None
    known = file.exists() or session.finished_training(task.name, wanted.digest) is None
    if known and session.has_expert(wanted):
        if not file.exists():
            session.progress.log(f"  {task.name}: another run has learned it; its expert is taken from there")
            card = session.experts.load(wanted).card
            write_json(file, task_metrics(session, task.name, metrics_on_card(card)))
        session.data.release(task)  # rows that were read ahead for nothing
        return TrainedExpert(wanted, file, before=True)
    return _trained(session, task, wanted, file, following, started)


def _trained(
    session: StreamSession,
    task: TaskConfig,
    wanted: ExpertReference,
    file: Path,
    following: TaskConfig | None,
    started: float,
) -> TrainedExpert:
    """Trains a task's expert into the store, then writes its metrics to `file`: the task counts as learned from then on."""
    assert wanted.digest is not None
    before = session.seconds_before(wanted)
    if session.finished_training(task.name, wanted.digest) is not None:
        session.progress.log(f"  {task.name}: its training was finished before, and is not repeated")
    elif before:
        session.progress.log(f"  {task.name}: goes on at its last checkpoint")
    with session.progress.working(f"reading {task.name}"):
        rows = session.data.training_rows(task)
    if following is not None:
        begin(partial(_read_ahead, session, following), name=f"looking at {following.name}")
    session.data.tell_set_aside(task.name, rows.aside[task.name], "train")
    aside = rows.aside[task.name]
    trained = session.train(*session.spec(task, wanted.digest))
    with reading_result(task.name, trained):
        session.experts.take(wanted, trained.expert)
    if trained.already_finished:
        before = trained.metrics["expert_seconds"] + trained.metrics["router_seconds"]
    metrics = trained.metrics | {
        "seconds": before + monotonic() - started,
        "rows": rows.counts[task.name],
        "quarantined": aside.rows,
        "lost_files": aside.files,
    }
    write_json(file, task_metrics(session, task.name, metrics))
    session.data.release(task)
    return TrainedExpert(wanted, file, before=False)


def with_metrics(file: Path, metrics: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Adds metrics that are known only after the pool is registered.

    `overhead_seconds`, beyond its optimizer steps from its first row to its pool's registration, but for the wait for its
    turn; `turn_seconds` until the next task's turn; `memory_bytes` of all processes here, then.
    """
    write_json(file, metrics | more)
    return metrics | more


def _read_ahead(session: StreamSession, task: TaskConfig) -> None:
    """Begins to read the rows of a later task if it is to be trained; to find that out its files are looked through."""
    if _to_be_trained(session, task) and not session.closed:
        session.data.read_ahead(task)


def _to_be_trained(session: StreamSession, task: TaskConfig) -> bool:
    """Whether a later task is not learned yet, as far as its state file tells."""
    try:
        return not (session.folder / "state" / f"task-{session.identity.expert(task)}.json").exists()
    except (StreamError, ForeignAdapterError):  # said when its turn comes
        return False
