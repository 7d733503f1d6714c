"""A sweep from end to end, inside a session over its stream: checks, trials, summary, report, MLflow, the winner's version."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from cluster.local import available_cpus, starts_here
from pipeline.config import LearnConfig, TaskConfig, digest
from pipeline.files import write_json
from pipeline.learning.changes import check_source
from pipeline.learning.opening import open_session
from pipeline.learning.progress import Progress
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import session_provenance
from pipeline.models.target_modules import check_target_modules
from pipeline.provenance import now
from pipeline.routing.pool import PoolCard
from tuning.candidate import register_winner
from tuning.objective import Objective
from tuning.report import write_report
from tuning.results import SweepResult
from tuning.runner import Runner
from tuning.samplers import Values
from tuning.search import Search
from tuning.space import Space
from tuning.sweep import sweep
from tuning.tracking import log_trials


@dataclass(frozen=True)
class Study:
    """What is swept, and how."""

    task: TaskConfig
    space: Space
    search: Search
    objective: Objective

    @property
    def name(self) -> str:
        """Digest of all that decides which trials there are, and which of them wins."""
        search = self.search
        return digest(
            self.task.name, self.space.plain(), search.algorithm, search.scheduler, search.trials, self.objective.text
        )


@dataclass(frozen=True)
class StudyResult:
    """A sweep that is over, and where to look."""

    result: SweepResult
    summary: dict[str, Any]
    folder: Path
    report: Path
    version: ModelVersion | None
    """The winner's version in the registry, where it was to be registered."""


def run(config: LearnConfig, study: Study, *, register: bool, progress: Progress) -> StudyResult:
    """Opens a session and sweeps; what an earlier call of the same sweep has done is found."""
    trainings = study.space.trainings(study.search.points, study.search.trials)
    with _opened(config, study, trainings, progress) as session:
        return _study(session, study, register=register)


@contextmanager
def _opened(config: LearnConfig, study: Study, trainings: int, progress: Progress) -> Iterator[StreamSession]:
    """Opens a session that trains as many experts at a time as the cluster holds.

    On CPUs of this machine each gets its share of the cores: two trainings of one thread each on two cores are done long before
    one after the other with two threads, which wait for each other.
    """
    training = config.training.model_copy(update={"parallel_tasks": "auto"})
    if starts_here() and not training.gpu:
        at_once = max(1, min(trainings, available_cpus() // training.workers))
        share = max(1, available_cpus() // (at_once * training.workers))
        training = training.model_copy(update={"cpus_per_worker": min(training.cpus_per_worker, share)})
    fitted = config.model_copy(update={"training": training})
    with open_session(fitted, job=f"sweep {study.name}", trainings=trainings, progress=progress) as session:
        yield session


def _study(session: StreamSession, study: Study, *, register: bool) -> StudyResult:
    started, task, progress = now(), study.task, session.progress
    _check(session, study)
    folder = _folder(session, study)
    if not task.validation:
        progress.log(_selected_on(task), "yellow")

    def runner(report: Any) -> Runner:
        made = Runner(session, task, study.space, study.objective, report, folder=folder)
        if not made.others:
            progress.log(
                "there is no learned pool with other tasks: the expert is evaluated alone; run `pointsman learn` first to "
                "sweep inside its pool"
            )
        study.objective.check(made.measured)
        return made

    with progress.working(f"sweeping {task.name} by {', '.join(study.space.names)}") as tell:
        tell(f"{study.search.trials} trials")
        result = sweep(session, study.space, study.search, runner, study.objective, folder, tell)
    summary = session_provenance(session, started) | {
        "task": task.name,
        "search": {"algorithm": study.search.algorithm, "scheduler": study.search.scheduler},
        "space": study.space.plain(),
        "selected_on": _selected_on(task),
        **result.summary(),
    }
    write_json(folder / "summary.json", summary)
    report = write_report(summary, folder)
    kept = f"the sweep's metrics are in {session.output.shown(folder)}; nothing will be trained again"
    files = [folder / "summary.json", report]
    session.retry(partial(log_trials, result, task.name, files), "logging the sweep", kept=kept)
    version = register_winner(session, task, result.best) if register and result.best is not None else None
    return StudyResult(result, summary, folder, report, version)


def _folder(session: StreamSession, study: Study) -> Path:
    """Returns the folder of a sweep: other data, another base or another pool around the expert make another one."""
    pool = session.folder / "pool"
    around = PoolCard.read(pool).model_dump(mode="json", exclude={"store"}) if (pool / "pool.json").exists() else None
    config = session.config
    depends = [session.identity.expert(study.task), around, session.identity.base_prompts, config.router]
    scored = [session.scored_rows, config.evaluation.max_new_tokens]
    return session.folder / "sweeps" / f"{study.task.name}-{digest(study.name, *depends, *scored)}"


def _check(session: StreamSession, study: Study) -> None:
    """Checks what would end trials later; tells what is fixed and may be meant otherwise."""
    config, task, space = session.config, study.task, study.space
    lists = {d.name: d.sampler.values for d in space.dimensions if isinstance(d.sampler, Values)}
    for targets in lists.get("expert.target_modules", (config.expert.target_modules,)):
        check_target_modules(config.base, targets)
    assert task.train is not None, "checked where configurations are read"
    check_source(session, task.train, f"task {task.name!r}, train")
    for name, other in session.data.eval_tasks.items():
        check_source(session, other.eval, f"task {name!r}, eval")
    if config.expert.alpha is not None and "expert.rank" in lists and "expert.alpha" not in space.names:
        session.progress.log(
            f"expert.alpha is {config.expert.alpha:g} at every rank, as the configuration says; without it alpha is 2 r"
        )


def _selected_on(task: TaskConfig) -> str:
    if task.validation:
        return (
            f"Trials are compared by their accuracy on the held-out rows of {task.name} (`validation`); its evaluation rows "
            "have no part in the choice. Other tasks and base abilities are measured on their evaluation rows."
        )
    return (
        f"{task.name} holds no rows out, so trials are compared on its evaluation rows, and the best looks better there than "
        "it is; `validation` (--validation 0.1) holds rows out for the choice."
    )
