"""Works off the points of a sweep: trains the experts that nobody has trained, evaluates each in the pool.

- An expert is found or named by its identity, as the stream's own is: two sweeps, and `pointsman learn`, share it.
- Trainings run on warm workers, as many at a time as the cluster holds; several trials that want the same one share it.
- Router settings change the pool alone. An evaluation generates the answers that nobody has generated.
"""

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from ray.exceptions import RayError

from pipeline.config import LearnConfig, TaskConfig
from pipeline.config.loading import with_values
from pipeline.errors import UserError
from pipeline.learning.background import begin
from pipeline.learning.identity import Identity
from pipeline.learning.session import StreamSession
from pipeline.routing.pool import Pool, PoolError
from pipeline.routing.store import ExpertReference, StoredExpert
from pipeline.training.session import TrainingGivenUp, reading_result
from pipeline.training.telemetry import RESTART, Step
from tuning.held_out import held_out_task
from tuning.objective import HELD_OUT, SELECTION, Objective
from tuning.search import GRID_POINT, SCORE, STEP, score
from tuning.space import Point, Space, routing_of, training_of
from tuning.trial_queue import FAILURE

_logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.2
"""Seconds between two looks at a training's steps: a scheduler that stops trainings hears of validations in time."""


@dataclass
class Training:
    """A training that trials wait for, or an expert that was there."""

    config: LearnConfig
    reference: ExpertReference
    wanted_by: set[str] = field(default_factory=set)
    reports: list[dict[str, Any]] = field(default_factory=list)
    """Of its validations so far."""
    expert: Future[StoredExpert] = field(default_factory=Future)
    seconds: float | None = None
    """Wall time, from the workers' start on it to the expert in the store; None where it was not trained now."""
    losses: list[float] = field(default_factory=list)


class Runner:
    """Serves trials; `report(trial, metrics)` tells them what comes out."""

    def __init__(
        self,
        session: StreamSession,
        task: TaskConfig,
        space: Space,
        objective: Objective,
        report: Callable[[str, dict[str, Any]], None],
        *,
        folder: Path,
    ) -> None:
        self.session, self.task, self.space, self.objective, self._report = session, task, space, objective, report
        self._pools = folder / "pools"
        self._pool = self._learned_pool()
        names = set(session.data.eval_tasks) - {task.name}
        self.others = [name for name in self._pool.names if name in names]
        self.abilities = [benchmark.name for benchmark in session.config.stream.benchmarks]
        self.held_out: str | None = None
        self.trainings: dict[str, Training] = {}
        """By the expert's digest."""
        self.failures: dict[str, str] = {}
        """Why trials have failed, by name."""
        self._failed: dict[str, str] = {}
        """The same by point: a trial that Tune starts once more hears it at once."""
        self._lock, self._evaluating = threading.Lock(), threading.Lock()
        self._slots = threading.Semaphore(session.capacity.trainings)
        self._turns: Any = nullcontext() if session.capacity.side_by_side else threading.Lock()

    @property
    def measured(self) -> list[str]:
        """The metrics of an objective that trials have."""
        there = {"others": self.others, "abilities": self.abilities}
        return ["accuracy", *(name for name, of in there.items() if of), "cost"]

    def prepare(self) -> None:
        """Reads the task's training rows, and writes the held-out ones of them as prompts, if there are any."""
        session, task = self.session, self.task
        if not task.validation:
            return
        held_out = held_out_task(
            task,
            self._rows(),
            session.config.seed,
            identity=session.identity.training_rows(task),
            data_folder=session.data.demo_folder,
            folder=session.output.data / "held-out",
        )
        session.data.eval_tasks[held_out.name] = held_out
        self.held_out = held_out.name

    def serve(self, trial: str, drawn: dict[str, Any]) -> None:
        """Works off what Tune has drawn for a trial; whatever is raised is that trial's end, not the sweep's."""
        point = self.point(drawn)
        try:
            if (known := self._failed.get(repr(point))) is not None:
                raise UserError(known)
            training = self._training(trial, point)
            metrics = self._evaluate(point, training)
        except TrainingGivenUp:
            return  # Tune has stopped the trial
        except Exception as error:  # noqa: BLE001 - one red row among the others
            if self.session.closed:  # the sweep was stopped
                return
            if not isinstance(error, (UserError, RayError)):
                _logger.exception("trial %s", trial)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failures[trial] = self._failed[repr(point)] = reason
            self._report(trial, {FAILURE: reason})
        else:
            self._report(trial, metrics | {"done": True})

    def leave(self, trial: str) -> None:
        """Hears that a trial has ended: a training that nobody waits for any more is given up."""
        with self._lock:
            for training in self.trainings.values():
                training.wanted_by.discard(trial)

    def close(self) -> None:
        """Removes what only the evaluations of this sweep needed."""
        shutil.rmtree(self._pools, ignore_errors=True)

    def point(self, drawn: dict[str, Any]) -> Point:
        """Returns the values that a trial tries."""
        return dict(drawn[GRID_POINT]) if GRID_POINT in drawn else self.space.point(self.session.config, drawn)

    def config(self, point: Point) -> LearnConfig:
        """Returns the configuration of a point."""
        return with_values(self.session.config, point, "the space")

    # Experts

    def reference(self, point: Point) -> ExpertReference:
        """Returns the reference to a point's expert, by its identity."""
        return self._named(self.config(training_of(point)))

    def _named(self, config: LearnConfig) -> ExpertReference:
        return self.session.reference(self.task.name, self._identity(config).expert(self.task))

    def _identity(self, config: LearnConfig) -> Identity:
        return replace(self.session.identity, config=config)  # which has read the files

    def _training(self, trial: str, point: Point) -> Training:
        """Returns the training of a point once its expert is there; it begins unless another trial has begun it."""
        config = self.config(training_of(point))
        reference = self._named(config)
        assert reference.digest is not None
        while True:
            with self._lock:
                training = self.trainings.get(reference.digest)
                begins = training is None or isinstance(_error(training.expert), TrainingGivenUp)
                if training is None or begins:
                    training = self.trainings[reference.digest] = Training(config, reference)
                training.wanted_by.add(trial)
                for report in training.reports:
                    self._report(trial, report)
            if begins:
                found = begin(partial(self._found_or_trained, training), name=f"expert {reference.digest}")
                found.add_done_callback(partial(_pass_on, training.expert))
            try:
                training.expert.result()
                return training
            except TrainingGivenUp:
                if trial not in training.wanted_by:
                    raise

    def _found_or_trained(self, training: Training) -> StoredExpert:
        session, reference = self.session, training.reference
        assert reference.digest is not None
        unfinished = session.finished_training(self.task.name, reference.digest) is None
        if not (unfinished and session.has_expert(reference)):
            self._train(training, reference.digest)
        return StoredExpert(ExpertReference.of(session.experts.ensure(reference)), session.experts)

    def _train(self, training: Training, digest: str) -> None:
        """Trains an expert into the store, on the first workers that are free."""
        session, task, config = self.session, self.task, training.config
        with self._slots, self._turns:
            if not training.wanted_by:
                raise TrainingGivenUp(digest)
            started = monotonic()
            spec = session.spec_alone(
                task,
                digest,
                identity=self._identity(config).parts(task),
                seed=config.seed,
                expert=config.expert,
                router=config.router,
                group_by_length=config.data.group_by_length,
            )
            trained = session.train_unseen(
                spec,
                self._rows(),
                partial(self._on_steps, training),
                every=REPORT_SECONDS,
                is_wanted=lambda: bool(training.wanted_by),
            )
            with reading_result(task.name, trained):
                session.experts.take(training.reference, trained.expert)
            training.losses = trained.metrics["expert_losses"]
            if not trained.already_finished:
                training.seconds = monotonic() - started

    def _rows(self) -> Any:
        return self.session.data.training_rows(self.task).training_rows([self.task.name])

    def _on_steps(self, training: Training, steps: list[Step]) -> None:
        for step in steps:
            if step.stage == RESTART:
                self.session.progress.log(f"  {step.remark}")
            if step.stage != "validation" or step.accuracy is None:
                continue
            report = {STEP: step.step, "validation_loss": step.loss, "validation_accuracy": step.accuracy}
            report |= {SCORE: score(step.accuracy, step.loss), "objective": step.accuracy}  # as far as it is known
            with self._lock:
                training.reports.append(report)
                for trial in training.wanted_by:
                    self._report(trial, report)

    # Evaluation

    def _learned_pool(self) -> Pool:
        """Returns the pool that the stream has learned, or an empty one."""
        session = self.session
        folder = session.folder / "pool"
        if (folder / "pool.json").exists():
            pool = Pool.load(folder, session.experts)
            if pool.base_fingerprint != session.fingerprint:
                raise PoolError(
                    f"{folder}: made for base {pool.base_label!r} with fingerprint {pool.base_fingerprint}, base.path has "
                    f"{session.fingerprint}; learn the stream again, or choose another `name`"
                )
            return pool
        config = session.config
        return Pool(config.base.label, session.fingerprint, config.router, **session.null_expert())

    def _evaluate(self, point: Point, training: Training) -> dict[str, Any]:
        """Returns a trial's metrics."""
        session, started = self.session, monotonic()
        expert, router = training.expert.result(), self.config(routing_of(point)).router
        with self._evaluating, self._turns:
            pool = self._pool.add(expert).routed_by(**router.model_dump())
            key = session.pool_key(pool)
            folder = pool.save(self._pools / key) if router.kind != "prompt" else None
            held_out = [self.held_out] if self.held_out is not None else []
            names = [self.task.name, *held_out, *self.others, *self.abilities]
            evaluation = session.evaluate(names, pool, key, folder=folder, samples=0, quietly=True)
        accuracies, card = evaluation.accuracies(), expert.expert.card
        metrics: dict[str, Any] = {
            STEP: training.config.expert.steps + 1,
            "accuracy": accuracies[self.task.name],
            "cost": _parameters(expert) / 1e6,
            "evaluation_seconds": monotonic() - started,
            "training_seconds": card.metrics["expert_seconds"] + card.metrics["router_seconds"],
            "expert_loss": card.metrics["expert_loss"],
            "expert": card.config_digest,
            "pool": key,
            "accuracies": accuracies,
        }
        for name, of in (("others", self.others), ("abilities", self.abilities)):
            if of:
                metrics[name] = fmean(accuracies[task] for task in of)
        if self.held_out is not None:
            metrics[HELD_OUT] = accuracies.pop(self.held_out)
        metrics[SELECTION] = metrics.get(HELD_OUT, metrics["accuracy"])
        metrics["validation_accuracy"] = card.metrics.get("validation_accuracy", metrics[SELECTION])
        return metrics | {SCORE: score(metrics["validation_accuracy"]), "objective": self.objective.of(metrics)}


def _error(future: Future[Any]) -> BaseException | None:
    return future.exception() if future.done() else None


def _pass_on(target: Future[Any], source: Future[Any]) -> None:
    if (error := source.exception()) is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())


def _parameters(expert: StoredExpert) -> int:
    return sum(adapter.a_RD.numel() + adapter.b_OR.numel() for adapter in expert.expert.adapters.values())
