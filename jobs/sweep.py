"""Sweeps LoRA rank and router temperature for one task of a stream with Ray Tune.

    python -m jobs.sweep jobs/configs/demo.yaml --task later --ranks 4,8,16 --temperatures 0.2,1,5

One training per rank, one evaluation per temperature, with the PHATGOOSE token router (the one that temperature affects
most), inside the pool that `pointsman learn` has made; the swept expert replaces the task's own there. Every trial is an
MLflow run nested in the sweep's.
"""

import math
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated

import mlflow
import typer
from mlflow import MlflowClient

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.options import ConfigFile, Overrides, job_command, load
from jobs.submit_options import Address, SubmittableCommand
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError, digest
from pipeline.files import write_json
from pipeline.learning.changes import check_source
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.learning.summary import session_provenance
from pipeline.models.target_modules import check_target_modules
from pipeline.provenance import now
from pipeline.registry.tracking import active_run, log_batch
from pipeline.routing.pool import Pool, PoolError
from tuning.space import SweepSpace
from tuning.sweep import SweepResult, sweep

Task = Annotated[str | None, typer.Option(help="Task of the stream to sweep; default: its last.")]
Ranks = Annotated[str, typer.Option(help="LoRA ranks, separated by commas; one training each.")]
Temperatures = Annotated[str, typer.Option(help="Router temperatures, separated by commas; one evaluation each.")]


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    task: Task = None,
    ranks: Ranks = "4,8,16",
    temperatures: Temperatures = "0.2,1,5",
    address: Address = None,
) -> None:
    """Sweep LoRA rank x router temperature for one task: one training per rank, one evaluation per temperature."""
    with user_errors():
        settings = load(config, overrides)
        try:
            space = SweepSpace(
                ranks=tuple(int(r) for r in ranks.split(",")),
                temperatures=tuple(float(t) for t in temperatures.split(",")),
            )
        except ValueError as error:
            raise ConfigError(f"--ranks {ranks} --temperatures {temperatures}: {error}") from None
        names = [known.name for known in settings.stream.tasks]
        if task is not None and task not in names:
            raise ConfigError(f"--task {task}: the stream has no such task; there are: {', '.join(names)}")
        if address:
            more = ["--ranks", ranks, "--temperatures", temperatures, *(["--task", task] if task else [])]
            job_command("jobs.sweep", config, overrides, address, *more)
        with open_session(settings, job=f"sweep {digest(space, task)}", progress=Terminal()) as session:
            _sweep(session, space, task or names[-1])


def _sweep(session: StreamSession, space: SweepSpace, name: str) -> None:
    started, begun, config = now(), monotonic(), session.config
    tasks = {task.name: task for task in config.stream.tasks}
    task = tasks[name]
    pool_folder = session.folder / "pool" if (session.folder / "pool" / "pool.json").exists() else None
    others = []
    if pool_folder:
        pool = Pool.load(pool_folder, session.experts)
        if pool.base_fingerprint != session.fingerprint:
            raise PoolError(
                f"{pool_folder}: made for base {pool.base_label!r} with fingerprint {pool.base_fingerprint}, base.path has "
                f"{session.fingerprint}; learn the stream again, or choose another `name`"
            )
        others = [n for n in pool.names if n != name and n in tasks]
    if not others:
        session.progress.log(
            "there is no learned pool with other tasks: the expert is evaluated alone, and temperature has no effect; run "
            "`pointsman learn` first to sweep inside its pool"
        )
    check_target_modules(config.base, config.expert.target_modules)
    assert task.train is not None, "checked where configurations are read"
    check_source(session, task.train, f"task {name!r}, train")
    for other in (name, *others):
        check_source(session, tasks[other].eval, f"task {other!r}, eval")
    spec, rows = session.spec(task, f"sweep-{session.identity.expert(task)}")
    evaluated = [name, *others]
    prompts = session.data.prompts(evaluated).rows(evaluated)
    evaluation = config.evaluation.to_identity(exclude={"expert_memory"})
    learned = spec.to_identity(exclude={"training"})
    folder = session.folder / "sweeps" / f"{name}-{digest(space, learned, evaluation)}"
    trials = len(space.ranks) * len(space.temperatures)
    worker_env = session.worker_env
    with session.progress.working(f"sweeping {name}: {len(space.ranks)} trainings, {trials} evaluations"):
        result = sweep(
            space,
            config,
            spec,
            rows,
            prompts=prompts,
            tasks=tasks,
            pool=pool_folder,
            folder=folder,
            answers=session.evaluator.store.folder,
            pool_key=session.identity.pool,
            worker_env=worker_env,
            log=session.progress.log,
        )
    summary = session_provenance(session, started) | {
        "task": name,
        "seconds_total": monotonic() - begun,
        "training_seconds": {str(rank): t["seconds"] for rank, t in result.trainings.items()},
        "trials": [vars(trial) for trial in result.trials],
    }
    write_json(folder / "summary.json", summary)
    kept = f"the sweep's metrics are in {folder}; nothing will be trained again"
    session.retry(partial(_log, result, name, folder / "summary.json"), "logging the sweep", kept=kept)
    _show(session, result, summary, folder)


def _log(result: SweepResult, task: str, summary: Path) -> None:
    """Writes a nested run for every trial that has none, and the summary."""
    parent = active_run().info
    mlflow.log_artifact(str(summary))
    nested_in = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'FINISHED'"
    there = MlflowClient().search_runs([parent.experiment_id], nested_in)
    logged = {trial.info.run_name for trial in there}
    for trial in result.trials:
        training = result.trainings[trial.rank]
        name = f"{task} r{trial.rank} t{trial.temperature:g}"
        if name in logged:
            continue
        with mlflow.start_run(experiment_id=parent.experiment_id, run_name=name, nested=True) as nested:
            mlflow.log_params({"task": task, "rank": trial.rank, "temperature": trial.temperature})
            points = [("accuracy", trial.accuracy, 0), ("expert_loss", training["expert_loss"], 0)]
            if not math.isnan(trial.others):
                points.append(("others", trial.others, 0))
            points += [("loss", loss, step + 1) for step, loss in enumerate(training["losses"])]
            log_batch(nested.info.run_id, points)


def _show(session: StreamSession, result: SweepResult, summary: dict[str, object], folder: Path) -> None:
    rows = [
        [
            str(t.rank),
            f"{t.temperature:g}",
            f"{t.accuracy:.3f}",
            "" if math.isnan(t.others) else f"{t.others:.3f}",
            f"{t.seconds:.1f}",
        ]
        for t in result.trials
    ]
    header = ["rank", "temperature", f"{summary['task']}", "other tasks", "seconds"]
    session.progress.show(table("Sweep", header, rows))
    trainings = ", ".join(f"rank {rank} {t['seconds']:.0f} s" for rank, t in result.trainings.items())
    session.progress.log(f"trainings: {trainings}; in all {summary['seconds_total']:.0f} s")
    session.progress.log(f"summary    {folder / 'summary.json'}")


if __name__ == "__main__":
    run_alone(main, SubmittableCommand)
