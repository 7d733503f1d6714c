"""A sweep with Ray Tune: its trials ask the driver, which trains and evaluates (`runner`).

Stopped at any moment, the same sweep goes on.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback, CheckpointConfig, FailureConfig, ResultGrid, RunConfig, TuneConfig, Tuner

from pipeline.errors import UserError
from pipeline.learning.background import begin
from pipeline.learning.session import StreamSession
from tuning.objective import Objective
from tuning.results import SHOWN, WORDS, SweepResult, Trial, ranked, shown
from tuning.runner import Runner
from tuning.search import Search
from tuning.space import Space, value_of
from tuning.trial import TOKEN
from tuning.trial import Trial as TuneTrial
from tuning.trial_queue import NAME, TrialQueue

RESTARTS = 2
"""How often a trial whose process has died is started again; its training goes on meanwhile."""

EXPERIMENT = "tune"
"""Folder of Tune's notes of a sweep."""

_logger = logging.getLogger(__name__)


def sweep(
    session: StreamSession,
    space: Space,
    search: Search,
    runner: Callable[[Callable[[str, dict[str, Any]], None]], Runner],
    objective: Objective,
    folder: Path,
    tell: Callable[[str], None] = lambda done: None,
) -> SweepResult:
    """Tries the points of a space; `runner` makes who works them off, given how to report; `tell` hears how far it is.

    What `folder` knows of an earlier call of the same sweep is not done again. A trial that fails is one result among others.
    """
    started = monotonic()
    # Beside the driver: what does not outlive it need not outlive a node either.
    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    queue = ray.remote(num_cpus=0, label_selector=node)(TrialQueue).options(name=NAME).remote()
    works = runner(lambda trial, report: queue.put.remote(trial, report))
    try:
        works.prepare()
        begin(partial(_serve, queue, works), name="serving trials")
        with _watched(_Watch(session, works, lambda ended: tell(f"{ended} of {search.trials} trials"))):
            found = _fit(session, space, search, objective, works, folder)
    finally:
        works.close()
        with suppress(RayError):
            ray.kill(queue)
    trainings = {digest: t for digest, t in works.trainings.items() if t.seconds is not None}
    return SweepResult(
        ranked([_trial(number, result, space, works) for number, result in enumerate(found, 1)]),
        objective,
        monotonic() - started,
        {digest: t.seconds for digest, t in trainings.items() if t.seconds is not None},
        {digest: t.losses for digest, t in works.trainings.items() if t.losses},
    )


def _serve(queue: Any, works: Runner) -> None:
    """Gives every trial that asks a thread of its own; they wait for each other where that saves work."""
    while True:
        try:
            asked = ray.get(queue.take.remote())
        except RayError:  # the sweep is over
            return
        if asked is None:
            return
        trial, drawn = asked
        begin(partial(works.serve, trial, drawn), name=f"trial {trial}")


def _fit(
    session: StreamSession, space: Space, search: Search, objective: Objective, works: Runner, folder: Path
) -> ResultGrid:
    """Runs Tune, from where an earlier call of the same sweep was stopped."""
    place, trainable = folder / EXPERIMENT, tune.with_resources(TuneTrial, TOKEN)
    if Tuner.can_restore(str(place)):
        try:
            # Tune's notes are pickled; they lie in the run's own folder, which nobody else writes.
            return Tuner.restore(str(place), trainable, resume_unfinished=True, restart_errored=True).fit()
        except (RayError, UserError):
            raise  # not of the notes
        except Exception as error:  # noqa: BLE001 - notes of a driver that was killed while it wrote them; they save no work
            _logger.warning("Tune's notes in %s cannot be used (%s): its trials are drawn anew", place, error)
    shutil.rmtree(place, ignore_errors=True)
    searcher = search.searcher(
        objective,
        works.measured,
        seed=session.config.seed,
        at_once=min(search.trials, session.capacity.trainings + 1),  # one is evaluated while the others train
    )
    return Tuner(
        trainable,
        param_space=search.param_space(space),
        tune_config=TuneConfig(
            num_samples=search.samples(space),
            search_alg=searcher,
            scheduler=search.stopper(space, session.config),
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=RunConfig(
            name=EXPERIMENT,
            storage_path=str(folder),
            verbose=0,
            failure_config=FailureConfig(max_failures=RESTARTS),
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Told()],
        ),
    ).fit()


def _folder_name(trial: Any) -> str:
    return str(trial.trial_id)


def _trial(number: int, result: Any, space: Space, works: Runner) -> Trial:
    point = works.point(result.config)
    config, metrics = works.config(point), result.metrics or {}
    values = {name: value_of(config, name) for name in space.names}
    if result.error is not None:
        return Trial(number, point, values, "failed", {}, works.failures.get(_id(result), _last_line(result.error)))
    kept = {name: value for name, value in metrics.items() if name in _METRICS}
    return Trial(number, point, values, "done" if "accuracy" in metrics else "stopped", kept)


_METRICS = {
    *SHOWN, "accuracies", "expert", "pool", "expert_loss", "training_seconds", "evaluation_seconds", "validation_accuracy",
    "validation_loss", "step",
}  # fmt: skip
"""What is kept of a trial's last report, beside which Tune writes its own."""


def _id(result: Any) -> str:
    return Path(result.path).name


def _last_line(error: Any) -> str:
    return str(error).strip().splitlines()[-1]


class _Watch:
    """Says of every trial that ends what came out, and whose training nobody waits for any more."""

    def __init__(self, session: StreamSession, works: Runner, count: Callable[[int], None]) -> None:
        self._session, self._works, self._count = session, works, count

    def ended(self, trial: Any, trials: Sequence[Any], *, failed: bool = False) -> None:
        """Hears of a trial's end; `trials` are all so far."""
        self._works.leave(trial.trial_id)
        self._count(len({t.trial_id for t in trials if t.is_finished()} | {trial.trial_id}))
        values = ", ".join(f"{n} {shown(v)}" for n, v in self._works.point(trial.config).items())
        metrics: Mapping[str, Any] = trial.last_result or {}
        if failed:
            reason = self._works.failures.get(trial.trial_id, "its process has died")
            self._session.progress.log(f"  {values}: failed: {reason}", "red")
        elif "accuracy" in metrics:
            told = [f"{WORDS[name]} {metrics[name]:.3f}" for name in SHOWN if metrics.get(name) is not None]
            self._session.progress.log(f"  {values}: {', '.join(told)}")
        else:
            so_far = metrics.get("validation_accuracy", 0.0)
            self._session.progress.log(f"  {values}: stopped after step {metrics.get('step')}, held out {so_far:.3f}")


_watch: _Watch | None = None
"""Who hears of the running sweep's trials; Tune stores its callbacks, and a sweep that goes on has another session."""


@contextmanager
def _watched(watch: _Watch) -> Iterator[None]:
    """Has `watch` hear of trials; Tune itself would print a traceback for each that fails."""
    global _watch
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        log.setLevel(level)


class _Told(Callback):
    """Tells the running sweep of its trials; holds nothing that Tune would store."""

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Called by Tune, for trials that its scheduler stops too."""
        if _watch is not None:
            _watch.ended(trial, trials)

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial is not started again."""
        if _watch is not None:
            _watch.ended(trial, trials, failed=True)
