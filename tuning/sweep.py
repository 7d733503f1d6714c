"""The sweep: train an expert at every rank, then evaluate each at every temperature, both with Ray Tune."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import CheckpointConfig, ResultGrid, RunConfig, TuneConfig, Tuner

from pipeline.config import LearnConfig, TaskConfig
from pipeline.training.run import TrainingError
from pipeline.training.worker import Job
from tuning.space import SweepSpace
from tuning.trial import TOKEN, Evaluator, evaluate_temperature, train_rank


@dataclass(frozen=True)
class Trial:
    """One point of the grid."""

    rank: int
    temperature: float
    accuracy: float
    """On the swept task."""
    others: float
    """Mean over the other tasks of the pool; not a number where there are none."""
    seconds: float
    """Of the evaluation."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    trainings: dict[int, dict[str, Any]]
    """By rank: `expert` (folder), `seconds`, `expert_loss`, `losses`."""
    trials: list[Trial]
    """By rank and temperature, best accuracy first."""


def sweep(
    space: SweepSpace,
    config: LearnConfig,
    job: Job,
    rows: ray.data.Dataset,
    *,
    prompts: ray.data.Dataset,
    tasks: Mapping[str, TaskConfig],
    pool: Path | None,
    folder: Path,
    worker_env: dict[str, str],
) -> SweepResult:
    """Sweeps rank and temperature for one task's expert inside `pool` (None: a pool of its own).

    `job` is the task's training job; `prompts` the encoded evaluation prompts of the swept task and the pool's others.
    Raises TrainingError with the trial's error if a trial fails.
    """
    threads = config.training.threads
    actor: Any = Evaluator
    evaluator = actor.options(num_cpus=0).remote(  # it computes while no training does
        config.base, str(pool) if pool else None, prompts, tasks, config.evaluation, threads
    )
    trained = _run(
        tune.with_parameters(
            train_rank,
            job=job.model_dump(),
            rows=rows,
            storage=str(folder / "training"),
            env=worker_env,
        ),
        {"rank": tune.grid_search(list(space.ranks))},
        at_once=_trainings_at_once(job),
        folder=folder / "tune",
        name="ranks",
    )
    trainings = {result.config["rank"]: dict(result.metrics) for result in trained}
    experts = {rank: metrics["expert"] for rank, metrics in trainings.items()}
    evaluated = _run(
        tune.with_parameters(evaluate_temperature, evaluator=evaluator, experts=experts),
        {
            "rank": tune.grid_search(list(space.ranks)),
            "temperature": tune.grid_search(list(space.temperatures)),
        },
        at_once=2,
        folder=folder / "tune",
        name="temperatures",
    )
    ray.kill(evaluator)
    trials = [
        Trial(
            result.config["rank"],
            result.config["temperature"],
            result.metrics["accuracy"],
            result.metrics["others"],
            result.metrics["seconds"],
        )
        for result in evaluated
    ]
    trials.sort(key=lambda t: (-t.accuracy, t.rank, t.temperature))
    return SweepResult(trainings, trials)


def _run(trainable: Any, space: dict[str, Any], *, at_once: int, folder: Path, name: str) -> ResultGrid:
    """Runs every point of a grid, `at_once` of them together; raises TrainingError if one fails."""
    results = Tuner(
        tune.with_resources(trainable, TOKEN),
        param_space=space,
        tune_config=TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=RunConfig(
            name=name, storage_path=str(folder), verbose=0, checkpoint_config=CheckpointConfig(num_to_keep=1)
        ),
    ).fit()
    if results.errors:
        raise TrainingError(f"sweep: {len(results.errors)} of {len(results)} trials failed; first: {results.errors[0]}")
    return results


def _trainings_at_once(job: Job) -> int:
    """Returns how many trainings the cluster holds together, by its GPUs or else its real cores.

    Logical CPUs would let trainings on a laptop crowd each other out.
    """
    if job.training.gpu:
        return max(1, int(ray.cluster_resources().get("GPU", 0)) // job.training.workers)
    return 1 if len(ray.nodes()) == 1 else max(1, len(ray.nodes()) // job.training.workers)
