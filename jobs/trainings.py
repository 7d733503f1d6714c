"""The trainings of a stream: one task after the other, or several of them at a time where the cluster has room."""

from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from jobs.background import begin
from jobs.recognition import expert_wanted
from jobs.state import write_json
from jobs.stream_run import StreamRun
from jobs.summary import figures_on_card, task_figures
from pipeline.config import TaskConfig
from pipeline.routing.expert import Expert
from pipeline.routing.store import ExpertReference
from pipeline.streams.faults import StreamError


@dataclass(frozen=True)
class TrainedExpert:
    """A task's expert in the store, registered or not."""

    reference: ExpertReference
    file: Path
    """Where its figures are."""
    before: bool
    """Whether it was there already."""


class Trainings:
    """Finds or trains the experts of a stream's tasks, up to `run.trainings_at_once` tasks ahead of the one asked for."""

    def __init__(self, run: StreamRun) -> None:
        self._run, self._tasks = run, list(run.config.stream.tasks)
        self._begun: dict[str, Future[TrainedExpert]] = {}

    def expert(self, task: TaskConfig) -> TrainedExpert:
        """Returns a task's expert; waits for its training, and raises what went wrong in it."""
        number = self._tasks.index(task)
        for ahead in range(number, min(number + self._run.trainings_at_once, len(self._tasks))):
            self._begin(ahead)
        return self._begun.pop(task.name).result()

    def _begin(self, number: int) -> None:
        """Begins to train a task's expert, if it is not there."""
        task, run, started = self._tasks[number], self._run, monotonic()
        if task.name in self._begun:
            return
        try:
            wanted = run.reference(task.name, expert_wanted(run, task))
        except Exception as error:  # noqa: BLE001 - raised when its turn comes: those before it are to be learned
            self._begun[task.name] = Future()
            self._begun[task.name].set_exception(error)
            return
        file = run.folder / "state" / f"task-{wanted.digest}.json"
        if (file.exists() or not run.has_trained(wanted)) and run.has_expert(wanted):
            if not file.exists():
                run.terminal.say(f"  {task.name}: another run has learned it; its expert is taken from there")
                card = run.experts.load(wanted).card
                write_json(file, task_figures(run, task.name, figures_on_card(card)))
            self._begun[task.name] = Future()
            self._begun[task.name].set_result(TrainedExpert(wanted, file, before=True))
            return
        _ = run.worker_env  # made once a node: no part of what learning a task takes
        following = next(iter(self._tasks[number + 1 :]), None)
        train = partial(_train, run, task, wanted, file, following, started)
        self._begun[task.name] = begin(train, name=f"training {task.name}")


def _train(
    run: StreamRun, task: TaskConfig, wanted: ExpertReference, file: Path, following: TaskConfig | None, started: float
) -> TrainedExpert:
    """Trains a task's expert into the store, then writes its figures to `file`: then it is learned, registered or not.

    While it trains the rows of the `following` task are read, if that is to be trained too.
    """
    assert wanted.digest is not None
    before = run.seconds_before(wanted)
    if before:
        run.terminal.say(f"  {task.name}: goes on at its last checkpoint")
    with run.terminal.working(f"reading {task.name}"):
        rows = run.training_rows(task)
    if following is not None and _to_be_trained(run, following):
        run.read_ahead(following)
    run.tell_set_aside(rows, task.name, "train")
    aside = rows.aside[task.name]
    trained = run.train(*run.job(task, wanted.digest))
    run.experts.put(Expert.load(trained.expert))
    figures = trained.figures | {
        "seconds": before + monotonic() - started,
        "rows": rows.counts[task.name],
        "quarantined": aside.rows,
        "lost_files": aside.files,
    }
    write_json(file, task_figures(run, task.name, figures))
    run.release(task)
    return TrainedExpert(wanted, file, before=False)


def with_figures(file: Path, figures: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Adds to a task's figures what is known late: `overhead_seconds`, beyond its optimizer steps from its first row to its
    pool's registration; `turn_seconds` until the next task's turn; `memory_bytes` of all processes here, then.
    """
    write_json(file, figures | more)
    return figures | more


def _to_be_trained(run: StreamRun, task: TaskConfig) -> bool:
    """Whether a task that comes later is not learned yet, as far as one can tell without a word."""
    try:
        return not (run.folder / "state" / f"task-{run.identity.expert(task)}.json").exists()
    except StreamError:  # said when its turn comes
        return False
