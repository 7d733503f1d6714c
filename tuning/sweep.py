"""The sweep: an expert trained at every rank, evaluated at every temperature, with Ray Tune."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, RunConfig, TuneConfig, Tuner

from cluster.local import available_cpus
from pipeline.config import LearnConfig, TaskConfig
from pipeline.training.run import TrainingError
from pipeline.training.worker import Job
from tuning.space import SweepSpace
from tuning.trial import TOKEN, EvaluateTemperature, Trainings


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
    say: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Sweeps rank and temperature for one task's expert inside `pool` (None: a pool of its own).

    `job` is the task's training job; `prompts` the encoded evaluation prompts of the swept task and the pool's others.
    `say` is told of every trial that is done. Raises TrainingError with the trial's error if a trial fails.
    """
    at_once, threads = _together(job, len(space.ranks))
    job = job.model_copy(update={"training": job.training.model_copy(update={"threads": threads})})
    actor: Any = Trainings
    trials_at_once = at_once * (job.training.workers if job.training.gpu else 1)
    trainings = actor.options(max_concurrency=len(space.ranks) + trials_at_once).remote(
        job, rows, space.ranks, at_once=at_once, storage=str(folder / "training"), env=worker_env
    )
    running = {trainings.finished.remote(rank): rank for rank in space.ranks}
    # Trials of a rank wait for its training; those of ranks that are done are evaluated beside the trainings that go on. But
    # not where each holds a GPU: trials that wait for trainings would leave them none.
    gpu = job.training.gpu
    if gpu:
        ray.wait(list(running), num_returns=len(running))
    results = Tuner(
        tune.with_resources(
            tune.with_parameters(
                EvaluateTemperature,
                trainings=trainings,
                base=config.base,
                pool=str(pool) if pool else None,
                prompts=prompts,
                tasks=dict(tasks),
                evaluation=config.evaluation,
                threads=threads,
            ),
            TOKEN | ({"gpu": 1} if gpu else {}),
        ),
        param_space={
            "rank": tune.grid_search(list(space.ranks)),
            "temperature": tune.grid_search(list(space.temperatures)),
        },
        tune_config=TuneConfig(max_concurrent_trials=trials_at_once, reuse_actors=True),
        run_config=RunConfig(
            name="temperatures",
            storage_path=str(folder / "tune"),
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Progress(running, say)],
        ),
    ).fit()
    if results.errors:
        raise TrainingError(f"sweep: {len(results.errors)} of {len(results)} trials failed; first: {results.errors[0]}")
    found = {rank: ray.get(training) for training, rank in running.items()}
    ray.kill(trainings)
    trials = [
        Trial(
            result.config["rank"],
            result.config["temperature"],
            result.metrics["accuracy"],
            result.metrics["others"],
            result.metrics["seconds"],
        )
        for result in results
    ]
    trials.sort(key=lambda t: (-t.accuracy, t.rank, t.temperature))
    return SweepResult(found, trials)


class _Progress(Callback):
    """Says of every training and trial that is done what came out."""

    def __init__(self, running: Mapping[Any, int], say: Callable[[str], None]) -> None:
        self._running, self._say = dict(running), say

    def __getstate__(self) -> dict[str, Any]:
        """What Tune stores of it: nothing, a terminal cannot be stored."""
        return {"_say": str, "_running": {}}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune, again and again."""
        for done in ray.wait(list(self._running), timeout=0)[0] if self._running else []:
            rank = self._running.pop(done)
            with suppress(ray.exceptions.RayError):  # the trials that wait for it fail, and say why
                training = ray.get(done)
                self._say(f"  rank {rank}: trained, loss {training['expert_loss']:.3f} ({training['seconds']:.0f} s)")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        found = trial.last_result
        self._say(
            f"  rank {trial.config['rank']}, temperature {trial.config['temperature']:g}: accuracy {found['accuracy']:.3f}, "
            f"others {found['others']:.3f} ({found['seconds']:.0f} s)"
        )


def _together(job: Job, ranks: int) -> tuple[int, int]:
    """Returns how many trainings the cluster holds together, and the threads of each of their workers.

    By its GPUs, or else its real cores: logical CPUs would let trainings on a laptop crowd each other out. Two trainings of
    one thread each on two cores are done long before one after the other with two threads, which wait for each other.
    """
    workers, threads = job.training.workers, job.training.threads
    if job.training.gpu:
        return max(1, int(ray.cluster_resources().get("GPU", 0)) // workers), threads
    if len(ray.nodes()) > 1:
        return max(1, len(ray.nodes()) // workers), threads
    at_once = max(1, min(ranks, available_cpus() // workers))
    return at_once, max(1, min(threads, available_cpus() // (at_once * workers)))
