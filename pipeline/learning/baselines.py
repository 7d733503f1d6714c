"""Baselines: what one would do instead of a routed pool, at equal steps per task.

base             the frozen base
oracle           oracle routing: the right expert is given (upper bound)
sequential ...   one LoRA, fine-tuned without a pool (`fine_tuning`)
token_phatgoose  the pool, one decision per token (the paper's router)
token            the pool, one decision per Linear, by log-likelihood
prompt           the pool, one closed-form decision per prompt
two_level        the pool, candidates per prompt, weights per Linear

Fine-tuning without a pool is chaotic: another seed, or another machine, forgets other things. It is therefore given as mean and
standard deviation over several seeds, where several are asked for.
"""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from pipeline.config import digest
from pipeline.evaluation.matrix import AccuracyMatrix, continual_metrics
from pipeline.evaluation.results import Evaluation
from pipeline.learning.fine_tuning import FineTuned, fine_tune, of_seed
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession
from pipeline.routing.adapters import load_adapters
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.pool import Pool
from pipeline.routing.statistics import PromptStatistics
from pipeline.training.session import reading_result

ROUTERS: dict[str, dict[str, str]] = {
    "token_phatgoose": {"kind": "token", "token_scores": "phatgoose"},
    "token": {"kind": "token", "token_scores": "gaussian"},
    "prompt": {"kind": "prompt"},
    "two_level": {"kind": "two_level"},
}
"""Router settings by the name that results bear."""
FINE_TUNED = ("sequential", "multitask")
"""Methods of fine-tuning that are compared unless others are asked for."""


def compare_methods(
    session: StreamSession,
    learned: LearnResult,
    *,
    seeds: int = 1,
    fine_tuned: Sequence[str] = FINE_TUNED,
    routers: Sequence[str] = tuple(ROUTERS),
    over_time: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates the other methods; returns the summary's `methods`.

    The methods of `fine_tuned` are trained with so many `seeds`, from the configuration's on. With `over_time` what goes from
    task to task is evaluated after each of them: on the tasks so far, at the end on everything.
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
    base = session.evaluate(names, None, "base", who="the base")
    every_seed = range(session.config.seed, session.config.seed + seeds)
    trained = fine_tune(session, [(name, seed) for seed in every_seed for name in fine_tuned])
    by_method: dict[str, list[dict[str, Any]]] = {name: [] for name in fine_tuned}
    for (name, seed), adapters in trained.items():
        last = _single(session, of_seed(session, name, seed), seed, adapters[-1], names)
        result = _method(session, last, adapters[-1].samples, adapters[-1].seconds)
        if over_time and len(adapters) == len(tasks):
            matrix = _over_time(session, of_seed(session, name, seed), seed, adapters[:-1])
            matrix.record("base", base.accuracies())
            matrix.record(adapters[-1].task, last.accuracies())
            result |= {"accuracy_matrix": matrix.to_json(), "continual": continual_metrics(matrix)}
        by_method[name].append(result)
    return {
        "base": _method(session, base, 0, 0.0),
        "oracle": _method(session, oracle, samples, expert_seconds),
        **{name: over_seeds(results, session.config.seed) for name, results in by_method.items()},
        **{name: _method(session, routed(name), samples, all_seconds) for name in routers},
    }


def _over_time(session: StreamSession, name: str, seed: int, adapters: Sequence[FineTuned]) -> AccuracyMatrix:
    """Evaluates a LoRA after each task, on the tasks so far."""
    stream = session.config.stream
    matrix = AccuracyMatrix([task.name for task in stream.tasks], [task.name for task in stream.benchmarks])
    for number, adapter in enumerate(adapters):
        seen = matrix.tasks[: number + 1]
        matrix.record(adapter.task, _single(session, name, seed, adapter, seen).accuracies())
    return matrix


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


def _single(session: StreamSession, name: str, seed: int, tuned: FineTuned, on: Sequence[str]) -> Evaluation:
    """Evaluates a single adapter that answers everything on these tasks and benchmarks."""
    with reading_result(name, tuned.trained):
        config, adapters = load_adapters(tuned.trained.adapter)
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=session.fingerprint,
        rank=session.config.expert.rank,
        alpha=session.config.expert.lora_alpha,
        seed=seed,
        data_fingerprint=tuned.key,
        config_digest=tuned.key,
        samples=tuned.samples,
    )
    nothing = PromptStatistics.of(torch.zeros(1, 1))  # nobody routes to it
    pool = Pool(
        session.config.base.label,
        session.fingerprint,
        session.config.router,
        [Expert(card, config, adapters, {}, nothing)],
    )
    return session.evaluate(on, pool, tuned.key, mode="single", who=name)
