"""The sweep: train an expert at every rank, then evaluate each at every temperature, both with Ray Tune."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, ResultGrid, RunConfig, TuneConfig, Tuner

from cluster.local import available_cpus
from pipeline.config import LearnConfig, RouterConfig, TaskConfig
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.models.inference import InferenceWorkers
from pipeline.training.session import TrainingError
from pipeline.training.spec import TrainSpec
from tuning.space import SweepSpace
from tuning.trial import TOKEN, EvaluateTemperature, TrainRank


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
    spec: TrainSpec,
    rows: TrainingRows,
    *,
    prompts: ray.data.Dataset,
    tasks: Mapping[str, TaskConfig],
    pool: Path | None,
    folder: Path,
    answers: Path,
    pool_key: Callable[[Sequence[str], RouterConfig], str],
    worker_env: dict[str, str],
    log: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Sweeps rank and temperature for one task's expert inside `pool` (None: a pool of its own).

    `spec` is the task's training; `prompts` the encoded evaluation prompts of the swept task and the pool's others;
    `answers` the folder of the store of answers, in which `pool_key` names pools by their experts' digests and their router.
    `log` gets a line for every trial that is done. Raises TrainingError with the trial's error if a trial fails.
    """
    at_once, threads = _together(spec, len(space.ranks))
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"cpus_per_worker": threads})})
    workers = InferenceWorkers.of(spec.training, config.evaluation)
    trained = _run(
        tune.with_parameters(
            TrainRank,
            spec=spec.model_dump(),
            rows=rows,
            storage=str(folder / "training"),
            env=worker_env,
        ),
        {"rank": tune.grid_search(list(space.ranks))},
        at_once=at_once,
        holding=TOKEN,
        folder=folder / "tune",
        name="ranks",
        log=log,
    )
    trainings = {result.config["rank"]: dict(result.metrics) for result in trained}
    evaluated = _run(
        tune.with_parameters(
            EvaluateTemperature,
            experts={rank: metrics["expert"] for rank, metrics in trainings.items()},
            base=config.base,
            pool=str(pool) if pool else None,
            prompts=prompts,
            tasks=dict(tasks),
            max_new_tokens=config.evaluation.max_new_tokens,
            workers=workers,
            answers=str(answers),
            pool_key=pool_key,
        ),
        {
            "rank": tune.grid_search(list(space.ranks)),
            "temperature": tune.grid_search(list(space.temperatures)),
        },
        at_once=max(1, at_once * spec.training.workers // workers.gpus) if workers.gpus else at_once,
        holding=TOKEN | ({"gpu": workers.gpus} if workers.gpus else {}),
        folder=folder / "tune",
        name="temperatures",
        log=log,
    )
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


def _run(
    trainable: Any,
    space: dict[str, Any],
    *,
    at_once: int,
    holding: dict[str, float],
    folder: Path,
    name: str,
    log: Callable[[str], None],
) -> ResultGrid:
    """Runs every point of a grid, `at_once` of them together, each `holding` resources.

    Raises TrainingError if one fails.
    """
    results = Tuner(
        tune.with_resources(trainable, holding),
        param_space=space,
        tune_config=TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=0,
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Progress(log)],
        ),
    ).fit()
    if results.errors:
        raise TrainingError(f"sweep: {len(results.errors)} of {len(results)} trials failed; first: {results.errors[0]}")
    return results


class _Progress(Callback):
    """Says of every trial that is done what came out."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log

    def __getstate__(self) -> dict[str, Any]:
        """What Tune stores of it: nothing, a terminal cannot be stored."""
        return {"_say": str}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        point = ", ".join(f"{name} {value:g}" for name, value in trial.config.items())
        result = trial.last_result
        metrics = [f"{name} {result[name]:.3f}" for name in ("expert_loss", "accuracy", "others") if name in result]
        self._log(f"  {point}: {', '.join(metrics)} ({result['seconds']:.0f} s)")


def _together(spec: TrainSpec, ranks: int) -> tuple[int, int]:
    """Returns how many trainings the cluster holds together, and the threads of each of their workers.

    By its GPUs, or else its real cores: logical CPUs would let trainings on a laptop crowd each other out. Two trainings of
    one thread each on two cores are done long before one after the other with two threads, which wait for each other.
    """
    workers, threads = spec.training.workers, spec.training.cpus_per_worker
    if spec.training.gpu:
        return max(1, int(ray.cluster_resources().get("GPU", 0)) // workers), threads
    if len(ray.nodes()) > 1:
        return max(1, len(ray.nodes()) // workers), threads
    at_once = max(1, min(ranks, available_cpus() // workers))
    return at_once, max(1, min(threads, available_cpus() // (at_once * workers)))
