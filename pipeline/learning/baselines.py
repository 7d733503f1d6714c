"""Baselines: what one would do instead of a routed pool, at equal steps per task.

base             the frozen base
oracle           oracle routing: the right expert is given (upper bound)
sequential       one LoRA, fine-tuned on task after task
multitask        one LoRA, trained on all tasks' data at once
token_phatgoose  the pool, one decision per token (the paper's router)
token            the pool, one decision per Linear, by log-likelihood
prompt           the pool, one closed-form decision per prompt
two_level        the pool, candidates per prompt, weights per Linear

Fine-tuning without a pool is chaotic: another seed, or another machine, forgets other things. `sequential` and `multitask` are
therefore given as mean and standard deviation over several seeds, where several are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
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
from pipeline.training.session import TrainResult, reading_result

ROUTERS: dict[str, dict[str, str]] = {
    "token_phatgoose": {"kind": "token", "token_scores": "phatgoose"},
    "token": {"kind": "token", "token_scores": "gaussian"},
    "prompt": {"kind": "prompt"},
    "two_level": {"kind": "two_level"},
}
"""Router settings by the name that results bear."""


def compare_methods(session: StreamSession, learned: LearnResult, *, seeds: int = 1) -> dict[str, Any]:
    """Trains and evaluates the other methods; returns the summary's `methods`.

    `sequential` and `multitask` are trained with so many `seeds`, from the configuration's on.
    """
    tasks = learned.summary["tasks"]
    samples = sum(t["samples"] for t in tasks.values())
    expert_seconds = sum(t["expert_seconds"] for t in tasks.values())
    all_seconds = expert_seconds + sum(t["router_seconds"] for t in tasks.values())
    names = list(session.data.eval_tasks)

    def routed(name: str) -> Evaluation:
        pool = learned.pool.routed_by(**ROUTERS[name])
        folder = pool.save(session.folder / "methods" / f"pool-{name}")
        return session.evaluate(names, pool, session.pool_key(pool), folder=folder, who=name)

    oracle = session.evaluate(names, learned.pool, digest(learned.pool_digest), mode="oracle", who="oracle routing")
    fine_tuned: dict[str, list[dict[str, Any]]] = {"sequential": [], "multitask": []}
    for seed in range(session.config.seed, session.config.seed + seeds):
        both = _both(
            partial(_sequential, session, seed),
            partial(_multitask, session, seed),
            at_once=session.capacity.trainings > 1,
        )
        for (name, results), adapter in zip(fine_tuned.items(), both, strict=True):
            evaluation = _single(session, _of_seed(session, name, seed), seed, adapter)
            results.append(_method(session, evaluation, adapter.samples, adapter.seconds))
    return {
        "base": _method(session, session.evaluate(names, None, "base", who="the base"), 0, 0.0),
        "oracle": _method(session, oracle, samples, expert_seconds),
        **{name: over_seeds(results, session.config.seed) for name, results in fine_tuned.items()},
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


def over_seeds(results: Sequence[dict[str, Any]], first: int) -> dict[str, Any]:
    """Returns the mean of one method's results with several seeds, from `first` on.

    `spread` holds the sample standard deviations and `by_seed` the single accuracies; of one seed there is neither. Samples
    are those of one seed, seconds the mean.
    """
    if len(results) == 1:
        return results[0]
    keys = [key for key in ("new", "base_abilities") if results[0][key] is not None]
    mean = {
        table: {name: fmean(result[table][name] for result in results) for name in results[0][table]}
        for table in ("columns", "columns_by_row")
    }
    return {
        **{key: fmean(result[key] for result in results) for key in ("seconds", *keys)},
        "samples": results[0]["samples"],
        **{key: None for key in ("new", "base_abilities") if key not in keys},
        **mean,
        "spread": {key: stdev(result[key] for result in results) for key in keys},
        "by_seed": {str(seed): {key: result[key] for key in keys} for seed, result in enumerate(results, first)},
    }


def _of_seed(session: StreamSession, name: str, seed: int) -> str:
    """The configuration's seed is not said: names of its results are as they were before there were others."""
    return name if seed == session.config.seed else f"{name}_seed{seed}"


@dataclass(frozen=True)
class _Adapter:
    """A single adapter that answers everything, and what it took."""

    trained: TrainResult
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


def _with_seed(session: StreamSession, what: str, seed: int) -> str:
    return what if seed == session.config.seed else f"{what}, seed {seed}"


def _sequential(session: StreamSession, seed: int) -> _Adapter:
    """One LoRA goes from task to task."""
    name = _of_seed(session, "sequential", seed)
    trained, key, samples, seconds = None, name, 0, 0.0
    for number, task in enumerate(session.config.stream.tasks):
        key, before = digest(key, session.identity.expert(task)), trained
        if (trained := session.finished_training(f"{name}_{task.name}", key)) is not None:
            session.log_curves(f"{name}_{task.name}", trained)
        else:
            what = _with_seed(session, "sequential fine-tuning", seed)
            session.progress.log(f"{what} {number + 1}/{len(session.config.stream.tasks)}: {task.name}", "bold")
            changes = {"task": f"{name}_{task.name}", "seed": seed, "router_stage": False, "validation": 0.0}
            spec, rows = session.spec(task, key, start=before and session.place_of(before.adapter), **changes)
            trained = session.train(spec, rows)
            session.data.release(task)
        samples += trained.metrics["samples"]
        seconds += trained.metrics["expert_seconds"]
    assert trained is not None, "a stream has tasks"
    return _Adapter(trained, key, samples, seconds)


def _multitask(session: StreamSession, seed: int) -> _Adapter:
    """One LoRA sees all tasks' rows, in as many steps as all experts together."""
    tasks, name = session.config.stream.tasks, _of_seed(session, "multitask", seed)
    key = digest(name, [session.identity.expert(task) for task in tasks])
    if (trained := session.finished_training(name, key)) is not None:
        session.log_curves(name, trained)
        return _Adapter(trained, key, trained.metrics["samples"], trained.metrics["expert_seconds"])
    session.progress.log(f"{_with_seed(session, 'multi-task training', seed)} on all {len(tasks)} tasks", "bold")
    expert = session.config.expert.model_copy(update={"steps": session.config.expert.steps * len(tasks)})
    changes = {
        "task": name,
        "seed": seed,
        "data_fingerprint": key,
        "expert": expert,
        "router_stage": False,
        "validation": 0.0,
    }
    with session.progress.working(f"reading {len(tasks)} tasks"):
        rows = session.data.all_training_rows()
    trained = session.train(session.spec_alone(tasks[0], key, **changes), rows)
    return _Adapter(trained, key, trained.metrics["samples"], trained.metrics["expert_seconds"])


def _single(session: StreamSession, name: str, seed: int, trained: _Adapter) -> Evaluation:
    """Evaluates a single adapter that answers everything."""
    with reading_result(name, trained.trained):
        config, adapters = load_adapters(trained.trained.adapter)
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=session.fingerprint,
        rank=session.config.expert.rank,
        alpha=session.config.expert.lora_alpha,
        seed=seed,
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
    return session.evaluate(list(session.data.eval_tasks), pool, trained.key, mode="single", who=name)
