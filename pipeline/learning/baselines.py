"""Baselines: what one would do instead of a routed pool, at equal steps per task.

base             the frozen base
specialist       each task's expert, told which task a prompt belongs to (the upper bound of routing)
sequential       one LoRA, fine-tuned on task after task
multitask        one LoRA, trained on all tasks' data at once
token_phatgoose  the pool, routed token by token (the paper's router)
token            the pool, every Linear for itself, by evidence
prompt           the pool, one closed-form decision per prompt
two_level        the pool, a short list by prompt, weighed by Linear
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config import digest
from pipeline.evaluation.results import Evaluation
from pipeline.learning.background import begin
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession
from pipeline.routing.adapters import load_adapters
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.pool import Pool
from pipeline.routing.statistics import PromptStatistics

ROUTERS: dict[str, dict[str, str]] = {
    "token_phatgoose": {"kind": "token", "token_scores": "phatgoose"},
    "token": {"kind": "token", "token_scores": "gaussian"},
    "prompt": {"kind": "prompt"},
    "two_level": {"kind": "two_level"},
}
"""Router settings by the name that results bear."""


def compare_methods(session: StreamSession, learned: LearnResult) -> dict[str, Any]:
    """Trains and evaluates the other methods; returns the summary's `methods`."""
    tasks = learned.summary["tasks"]
    samples = sum(t["samples"] for t in tasks.values())
    expert_seconds = sum(t["expert_seconds"] for t in tasks.values())
    all_seconds = expert_seconds + sum(t["router_seconds"] for t in tasks.values())
    columns = list(session.columns)

    def routed(name: str) -> Evaluation:
        pool = learned.pool.routed_by(**ROUTERS[name])
        folder = pool.save(session.folder / "methods" / f"pool-{name}")
        return session.evaluate(columns, pool, session.pool_key(pool), folder=folder, who=name)

    told = session.evaluate(columns, learned.pool, digest(learned.pool_digest), mode="told", who="specialist")
    sequential, multitask = _both(
        partial(_sequential, session), partial(_multitask, session), at_once=session.capacity.trainings > 1
    )
    return {
        "base": _method(session, session.evaluate(columns, None, "base", who="the base"), 0, 0.0),
        "specialist": _method(session, told, samples, expert_seconds),
        "sequential": _method(
            session, _only(session, "sequential", sequential), sequential.samples, sequential.seconds
        ),
        "multitask": _method(session, _only(session, "multitask", multitask), multitask.samples, multitask.seconds),
        **{name: _method(session, routed(name), samples, all_seconds) for name in ROUTERS},
    }


def _method(session: StreamSession, evaluation: Evaluation, samples: int, seconds: float) -> dict[str, Any]:
    accuracies = evaluation.accuracies()
    new = [accuracies[task.name] for task in session.config.stream.tasks]
    old = [accuracies[task.name] for task in session.config.stream.benchmarks]
    return {
        "new": sum(new) / len(new),
        "base_abilities": sum(old) / len(old) if old else None,
        "samples": samples,
        "seconds": seconds,
        "columns": accuracies,
        "columns_by_row": evaluation.row_accuracies(),
    }


@dataclass(frozen=True)
class _Adapter:
    """A single adapter that answers everything, and what it took."""

    folder: Path
    key: str
    """Names what it was trained from."""
    samples: int
    seconds: float


def _both(one: Callable[[], _Adapter], other: Callable[[], _Adapter], *, at_once: bool) -> tuple[_Adapter, _Adapter]:
    """Does both trainings, one after the other or side by side."""
    if not at_once:
        return one(), other()
    beside = begin(other, name="training beside")
    return one(), beside.result()


def _sequential(session: StreamSession) -> _Adapter:
    """One LoRA goes from task to task."""
    adapter, key, samples, seconds = None, "sequential", 0, 0.0
    for number, task in enumerate(session.config.stream.tasks):
        session.progress.say(
            f"sequential fine-tuning {number + 1}/{len(session.config.stream.tasks)}: {task.name}", "bold"
        )
        key = digest(key, session.identity.expert(task))
        changes = {"task": f"sequential_{task.name}", "router_stage": False, "validation": 0.0}
        trained = session.train(*session.spec(task, key, start=str(adapter) if adapter else None, **changes))
        adapter = trained.adapter
        session.release(task)
        samples += trained.figures["samples"]
        seconds += trained.figures["expert_seconds"]
    assert adapter is not None, "a stream has tasks"
    return _Adapter(adapter, key, samples, seconds)


def _multitask(session: StreamSession) -> _Adapter:
    """One LoRA sees all tasks' rows, in as many steps as all experts together."""
    tasks = session.config.stream.tasks
    session.progress.say(f"multi-task training on all {len(tasks)} tasks", "bold")
    key = digest("multitask", [session.identity.expert(task) for task in tasks])
    expert = session.config.expert.model_copy(update={"steps": session.config.expert.steps * len(tasks)})
    changes = {"task": "multitask", "data_fingerprint": key, "expert": expert, "router_stage": False, "validation": 0.0}
    with session.progress.working(f"reading {len(tasks)} tasks"):
        rows = session.all_training_rows()
    trained = session.train(session.spec_alone(tasks[0], key, **changes), rows)
    return _Adapter(trained.adapter, key, trained.figures["samples"], trained.figures["expert_seconds"])


def _only(session: StreamSession, name: str, trained: _Adapter) -> Evaluation:
    """Evaluates a single adapter that answers everything."""
    config, adapters = load_adapters(trained.folder)
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=session.fingerprint,
        rank=session.config.expert.rank,
        alpha=session.config.expert.lora_alpha,
        seed=session.config.seed,
        data_fingerprint=trained.key,
        config_digest=trained.key,
        samples=trained.samples,
    )
    nothing = PromptStatistics.of(torch.zeros(1, 1))  # nobody routes to it
    pool = Pool(
        session.config.base.label,
        session.fingerprint,
        session.config.router,
        [Expert(card, config, adapters, {}, nothing)],
    )
    return session.evaluate(list(session.columns), pool, trained.key, mode="only", who=name)
