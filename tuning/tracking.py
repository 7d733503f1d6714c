"""A sweep's trials in MLflow: runs nested in the sweep's, with the same parameters and metrics, so that they compare.

A trial's run is found again by its point: the same sweep repeated writes nothing twice.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Param, Run

from pipeline.config import digest
from pipeline.registry.tracking import RUN_TAG, active_run, log_batch
from tuning.results import SHOWN, SweepResult, Trial

POINTS = 100
"""Most points of a loss curve."""

_STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def log_trials(result: SweepResult, task: str, files: Sequence[Path]) -> None:
    """Writes a nested run for every trial that has none, and `files` as artifacts of the sweep's run."""
    parent = active_run().info
    for file in files:
        mlflow.log_artifact(str(file))
    if (best := result.best) is not None:
        client = MlflowClient()
        client.set_tag(parent.run_id, "best", best.name)
        log_batch(parent.run_id, [(f"best/{name}", value, 0) for name, value in _metrics(best)])
    known = {run.data.tags.get(RUN_TAG): run for run in _nested(parent.experiment_id, parent.run_id)}
    for trial in result.trials:
        _log(trial, task, result, parent.experiment_id, known.get(_digest(trial)))


def _nested(experiment: str, parent: str) -> Iterator[Run]:
    """Yields the runs that are nested in a run."""
    client, token = MlflowClient(), None
    while True:
        page = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _digest(trial: Trial) -> str:
    return digest("trial", trial.point)


def _log(trial: Trial, task: str, result: SweepResult, experiment: str, before: Run | None) -> None:
    status = _STATUS[trial.status]
    if before is not None and before.info.status in {"FINISHED", status}:
        return
    client = MlflowClient()
    if before is None:
        with mlflow.start_run(
            experiment_id=experiment, run_name=f"{task} {trial.name}", nested=True, tags={RUN_TAG: _digest(trial)}
        ) as opened:
            run_id = opened.info.run_id
        params = [Param("task", task), *(Param(name, str(value)) for name, value in trial.values.items())]
        client.log_batch(run_id, params=params)
    else:
        run_id = before.info.run_id
    points = [(name, value, 0) for name, value in _metrics(trial)]
    points += [(f"accuracy/{name}", value, 0) for name, value in trial.metrics.get("accuracies", {}).items()]
    losses = result.curves.get(str(trial.metrics.get("expert")), ())
    every = max(1, len(losses) // POINTS)
    points += [("loss", loss, step) for step, loss in enumerate(losses, 1) if step % every == 0 or step == len(losses)]
    log_batch(run_id, points)
    client.set_tag(run_id, "status", trial.status)
    if trial.error:
        client.set_tag(run_id, "error", trial.error[:5000])
    client.set_terminated(run_id, status)


def _metrics(trial: Trial) -> list[tuple[str, float]]:
    names = (*SHOWN, "expert_loss", "training_seconds", "evaluation_seconds", "validation_accuracy")
    return [(name, float(trial.metrics[name])) for name in names if trial.metrics.get(name) is not None]
