"""Fine-tuning without a pool: one LoRA that answers everything, at equal steps per task.

sequential       from task to task
replay           from task to task, with 5 % of the rows of all tasks before
ewc              from task to task, with elastic weight consolidation (`training.elastic_weights`)
multitask        all tasks' rows at once
multitask_base   all tasks' rows and the base prompts with their answers at once

What goes from task to task has a LoRA after each of them; what sees all at once has one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import ConfigError, TaskConfig, digest
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.learning.background import begin
from pipeline.learning.session import StreamSession
from pipeline.training.session import TrainResult

REPLAYED = 0.05
"""Share of each earlier task's rows that `replay` keeps."""
ELASTICITY = 100.0
"""Strength of the penalty of `ewc`: of 1e2 to 1e5 the one that kept most of three of the demo's tasks, 60 steps each."""


@dataclass(frozen=True)
class FineTuned:
    """A single LoRA that answers everything, and what it took, the LoRAs before it included."""

    task: str
    """The task after which it is there: the last one of the stream, where it saw all at once."""
    trained: TrainResult
    key: str
    """Names what it was trained from."""
    samples: int
    seconds: float


Method = Callable[[StreamSession, int], list[FineTuned]]
"""Trains with a seed, or finds what was trained; returns the LoRA after each task, or the one after all."""


def sequential(session: StreamSession, seed: int) -> list[FineTuned]:
    """One LoRA goes from task to task."""
    return _from_task_to_task(session, "sequential", "sequential fine-tuning", seed)


def replay(session: StreamSession, seed: int) -> list[FineTuned]:
    """One LoRA goes from task to task, and sees a share of the earlier tasks' rows again."""

    def rows(task: TaskConfig, earlier: Sequence[TaskConfig]) -> TrainingRows:
        return session.data.replayed_rows(task, earlier, REPLAYED, seed)

    return _from_task_to_task(session, "replay", "fine-tuning with replay", seed, settings=[REPLAYED], rows=rows)


def ewc(session: StreamSession, seed: int) -> list[FineTuned]:
    """One LoRA goes from task to task, and is held near where earlier tasks need it."""
    if session.config.training.zero_stage == 3:
        raise ConfigError(
            "method ewc: training.zero_stage is 3, and its penalty needs whole weights; set it to 2 or less"
        )
    changes = {"elasticity": ELASTICITY}
    return _from_task_to_task(session, "ewc", "fine-tuning with EWC", seed, settings=[ELASTICITY], changes=changes)


def multitask(session: StreamSession, seed: int) -> list[FineTuned]:
    """One LoRA sees all tasks' rows, in as many steps as all experts together."""
    return _all_at_once(session, "multitask", "multi-task training", seed)


def multitask_base(session: StreamSession, seed: int) -> list[FineTuned]:
    """One LoRA sees all tasks' rows and the base prompts, in as many steps as all experts together."""
    source = session.config.stream.base_prompts
    if source is None:
        raise ConfigError("method multitask_base: stream.base_prompts are what it learns beside the tasks; name them")
    return _all_at_once(session, "multitask_base", "multi-task training with base prompts", seed, base_prompts=True)


METHODS: dict[str, Method] = {f.__name__: f for f in (sequential, multitask, multitask_base, replay, ewc)}
"""All of them by the name that results bear."""


def fine_tune(session: StreamSession, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], list[FineTuned]]:
    """Does these trainings, (method, seed) each, as many side by side as the cluster has room for."""
    left, done = deque(wanted), dict[tuple[str, int], list[FineTuned]]()

    def work() -> None:
        while left:
            name, seed = left.popleft()
            done[name, seed] = METHODS[name](session, seed)

    others = [begin(work, name=f"training beside, {i}") for i in range(1, min(session.capacity.trainings, len(left)))]
    work()
    for other in others:
        other.result()
    return {of: done[of] for of in wanted}


def of_seed(session: StreamSession, name: str, seed: int) -> str:
    """The configuration's seed is not said: names of its results are as they were before there were others."""
    return name if seed == session.config.seed else f"{name}_seed{seed}"


def _with_seed(session: StreamSession, what: str, seed: int) -> str:
    return what if seed == session.config.seed else f"{what}, seed {seed}"


def _from_task_to_task(
    session: StreamSession,
    method: str,
    what: str,
    seed: int,
    *,
    settings: Sequence[Any] = (),
    changes: dict[str, Any] | None = None,
    rows: Callable[[TaskConfig, Sequence[TaskConfig]], TrainingRows] | None = None,
) -> list[FineTuned]:
    """Trains one LoRA on task after task; `settings` name the method's own, `rows` are those of a task and earlier ones."""

    def own(task: TaskConfig, earlier: Sequence[TaskConfig]) -> TrainingRows:
        return session.data.training_rows(task).training_rows([task.name])

    name, tasks, rows = of_seed(session, method, seed), session.config.stream.tasks, rows or own
    key = digest(name, *settings) if settings else name
    before, samples, seconds, after = None, 0, 0.0, list[FineTuned]()
    for number, task in enumerate(tasks):
        label = f"{name}_{task.name}"
        key = digest(key, session.identity.expert(task))
        if (trained := session.finished_training(label, key)) is not None:
            session.log_curves(label, trained)
        else:
            session.progress.log(f"{_with_seed(session, what, seed)} {number + 1}/{len(tasks)}: {task.name}", "bold")
            spec = session.spec_alone(
                task,
                key,
                task=label,
                seed=seed,
                router_stage=False,
                validation=0.0,
                start=None if before is None else session.place_of(before.adapter),
                **(changes or {}),
            )
            trained = session.train(spec, rows(task, tasks[:number]))
            session.data.release(task)
        samples += trained.metrics["samples"]
        seconds += trained.metrics["expert_seconds"]
        after.append(FineTuned(task.name, trained, key, samples, seconds))
        before = trained
    return after


def _all_at_once(
    session: StreamSession, method: str, what: str, seed: int, *, base_prompts: bool = False
) -> list[FineTuned]:
    tasks, name = session.config.stream.tasks, of_seed(session, method, seed)
    more = [session.identity.base_prompts] if base_prompts else []
    key = digest(name, [session.identity.expert(task) for task in tasks], *more)
    if (trained := session.finished_training(name, key)) is not None:
        session.log_curves(name, trained)
    else:
        session.progress.log(f"{_with_seed(session, what, seed)} on all {len(tasks)} tasks", "bold")
        expert = session.config.expert.model_copy(update={"steps": session.config.expert.steps * len(tasks)})
        spec = session.spec_alone(
            tasks[0],
            key,
            task=name,
            seed=seed,
            data_fingerprint=key,
            expert=expert,
            router_stage=False,
            validation=0.0,
        )
        with session.progress.working(f"reading {len(tasks)} tasks"):
            rows = session.data.all_training_rows(base_prompts=base_prompts)
        trained = session.train(spec, rows)
    return [FineTuned(tasks[-1].name, trained, key, trained.metrics["samples"], trained.metrics["expert_seconds"])]
