"""How a space is searched, and when a trial is stopped: Ray Tune's own algorithms."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

from pipeline.config import ConfigError, LearnConfig, TaskConfig
from tuning.objective import Objective
from tuning.samplers import Range, Values
from tuning.space import Point, Space, value_of

Algorithm = Literal["grid", "random", "optuna"]
Scheduler = Literal["none", "asha"]

REDUCTION = 3
"""ASHA: one trial in so many goes on at each rung."""

GRID_POINT = "point"
"""Key of a grid's point in a trial's configuration."""

STEP = "step"
"""Key of the optimizer step that a trial reports."""

SCORE = "validation_score"
"""Key of what ASHA compares: `score`."""

TIE = 1e-3
"""Weight of the loss in it: it decides between equal accuracies, as all are before a task is understood."""


def score(accuracy: float, loss: float = 0.0) -> float:
    """Returns what trainings are compared by after equal steps: accuracy on held-out rows, of equal ones their loss."""
    return accuracy - TIE * loss


@dataclass(frozen=True)
class Search:
    """Which points of a space are tried."""

    algorithm: Algorithm
    scheduler: Scheduler
    trials: int
    """Number of trials; of a grid, of its points."""
    points: tuple[Point, ...] | None
    """Of a grid: its points."""

    @classmethod
    def read(
        cls,
        space: Space,
        config: LearnConfig,
        task: TaskConfig,
        *,
        algorithm: str | None,
        scheduler: str,
        trials: int | None,
        objective: Objective,
    ) -> "Search":
        """Checks the options of a search; raises ConfigError.

        Default: the grid of a space of lists, else random points.
        """
        if algorithm is None:
            some_range = any(isinstance(d.sampler, Range) for d in space.dimensions)
            algorithm = "random" if some_range or trials is not None else "grid"
        if algorithm not in get_args(Algorithm):
            raise ConfigError(f"--search {algorithm}: there are {', '.join(get_args(Algorithm))}")
        if scheduler not in get_args(Scheduler):
            raise ConfigError(f"--scheduler {scheduler}: there are {', '.join(get_args(Scheduler))}")
        if scheduler == "asha":
            _check_asha(space, config, task)
        if algorithm == "grid":
            if trials is not None:
                raise ConfigError(
                    "--trials: --search grid tries every combination once; leave it out, or take --search random"
                )
            # ASHA compares a trial with those before it: of values that become better and better it would stop none.
            points = tuple(space.grid(config, shuffled=scheduler == "asha"))
            return cls("grid", scheduler, len(points), points)  # type: ignore[arg-type]  # checked above
        if trials is None or trials < 1:
            raise ConfigError(f"--search {algorithm} draws points: say how many with --trials N, 1 or more")
        if algorithm == "optuna":
            _check_optuna(space)
            if objective.pareto and scheduler == "asha":
                raise ConfigError(
                    "--objective pareto with --search optuna needs all metrics of every trial, and --scheduler asha stops "
                    "some: leave one of them out"
                )
        return cls(algorithm, scheduler, trials * _grids(space), None)  # type: ignore[arg-type]  # checked above

    def param_space(self, space: Space) -> dict[str, Any]:
        """Returns what Tune draws trials from."""
        from ray import tune

        if self.points is not None:
            return {GRID_POINT: tune.grid_search(list(self.points))}
        return {dimension.name: dimension.sampler.domain() for dimension in space.dimensions}

    def samples(self, space: Space) -> int:
        """Returns Tune's `num_samples`: how often its grids, if there are any, are gone through."""
        return 1 if self.points is not None else self.trials // _grids(space)

    def searcher(self, objective: Objective, measured: Sequence[str], *, seed: int, at_once: int) -> Any:
        """Returns Tune's search algorithm, `at_once` trials at a time; `measured` are the metrics that trials have."""
        if self.algorithm == "optuna":
            import optuna
            from ray.tune.search import ConcurrencyLimiter
            from ray.tune.search.optuna import OptunaSearch

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            metric, mode = objective.optimized(measured)
            return ConcurrencyLimiter(OptunaSearch(metric=metric, mode=mode, seed=seed), max_concurrent=at_once)
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # Tune's own `max_concurrent_trials` does not reach a generator that is given.
        return BasicVariantGenerator(max_concurrent=at_once, random_state=seed)

    def stopper(self, space: Space, config: LearnConfig) -> Any:
        """Returns Tune's scheduler."""
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

        if self.scheduler == "none":
            return FIFOScheduler()
        steps = max(_values(space, config, "expert.steps"))
        return ASHAScheduler(
            time_attr=STEP,
            metric=SCORE,
            mode="max",
            max_t=int(steps),
            grace_period=int(config.expert.validate_every),
            reduction_factor=REDUCTION,
            stop_last_trials=False,  # the last report of a training is not that of its evaluation
        )


def _grids(space: Space) -> int:
    """Returns how many points the grids within a random search have."""
    count = 1
    for dimension in space.dimensions:
        if isinstance(dimension.sampler, Values) and dimension.sampler.kind == "grid":
            count *= len(dimension.sampler.values)
    return count


def _values(space: Space, config: LearnConfig, name: str) -> Sequence[Any]:
    """Returns the values that a field may have."""
    found = next((d.sampler for d in space.dimensions if d.name == name), None)
    return (value_of(config, name),) if found is None else found.tried


def _check_asha(space: Space, config: LearnConfig, task: TaskConfig) -> None:
    if not task.validation:
        raise ConfigError(
            f"--scheduler asha stops trainings by their accuracy on held-out rows, and task {task.name!r} holds none out: "
            "give it `validation`, e.g. --validation 0.1"
        )
    if "expert.validate_every" in space.names:
        raise ConfigError(
            "--scheduler asha compares trials after equal steps: expert.validate_every cannot be swept too"
        )
    steps = min(_values(space, config, "expert.steps"))
    if config.expert.validate_every >= steps:
        raise ConfigError(
            f"--scheduler asha stops trainings at validations, and expert.validate_every is {config.expert.validate_every} "
            f"with {steps} steps: lower it, e.g. expert.validate_every={max(1, int(steps) // 10)}"
        )


def _check_optuna(space: Space) -> None:
    if find_spec("optuna") is None:
        raise ConfigError("--search optuna needs the package optuna: pip install 'pointsman[optuna]'")
    for dimension in space.dimensions:
        if isinstance(dimension.sampler, Values) and dimension.sampler.kind == "grid":
            raise ConfigError(
                f"{dimension.source}: {dimension.name}: --search optuna draws values, it has no grid; write choice:"
            )
