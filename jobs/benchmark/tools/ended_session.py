"""A session of one task whose training and evaluation are over, without Ray: what it tells the registry is still to come."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from mlflow.entities.model_registry import ModelVersion

from jobs.benchmark.tools.synthetic_experts import BASE
from pipeline.config import LearnConfig, RegistryConfig, SourceConfig, StreamConfig, TaskConfig
from pipeline.evaluation.results import Evaluation, Prediction, TaskResult
from pipeline.learning.catalog import Catalog
from pipeline.registry.evaluated_prompts import EvaluatedPrompts
from pipeline.registry.experts import registered_experts
from pipeline.routing.pool import Pool

ABILITY, DIGESTS, PROMPTS = "shape", {"shape": "s"}, 8


def ended_session(task: str, digest: str, pool: str, experiment: str, run_id: str) -> Any:
    """Returns what of a `StreamSession` registering reads; `digest` is that of the task's expert, `pool` the pool's name."""
    source = SourceConfig(path="demo://clock/train")
    stream = StreamConfig(
        tasks=(TaskConfig(name=task, train=source, eval=source),), benchmarks=(TaskConfig(name=ABILITY, eval=source),)
    )
    return SimpleNamespace(
        config=LearnConfig(name=f"{pool}-{task}", base=BASE, stream=stream, registry=RegistryConfig(pool=pool)),
        experiment=experiment,
        mlflow_run_id=run_id,
        identity=SimpleNamespace(expert=lambda task: digest, parts=lambda task: {}),
        experts=registered_experts(),
        evaluated_prompts=_prompts,
        progress=SimpleNamespace(log=lambda text: None),
        retry=lambda action, what, kept="": action(),
    )


def tell(session: Any, version: ModelVersion, pool: Pool, expert: ModelVersion) -> None:
    """Tells the registry what a pool's version, and the expert that it brings, score on made-up prompts."""
    (task,), tasks = session.config.stream.tasks, [name for name in pool.names if name not in pool.retired]
    results = {name: _result(name, "base" if name == ABILITY else name) for name in (*tasks, ABILITY)}
    evaluation = Evaluation(results)
    catalog = Catalog(session, dict.fromkeys(results, 0.5), dict.fromkeys(results, "d") | DIGESTS)
    catalog.show(version, pool, evaluation, expert)
    catalog.close(version, pool, evaluation, {task.name: expert}, {task.name: {"rows": 1000}})


def _result(dataset: str, own: str) -> TaskResult:
    """Returns the result on prompts that `own` answers rightly, but for one, which goes elsewhere."""
    answered = [(own, 1.0)] * (PROMPTS - 1) + [("base" if own != "base" else "second", 0.5)]
    predictions = [
        Prediction(
            dataset, f"{dataset}#{i}", f"question {i}", "answer", "answer" if score == 1 else "other", score, who
        )
        for i, (who, score) in enumerate(answered)
    ]
    return TaskResult.of(predictions, 1, own=own)


def _prompts(name: str, pool: Pool) -> EvaluatedPrompts:
    features_NF = np.zeros((PROMPTS, pool.width or 0), np.float32)
    ids = [f"{name}#{number}" for number in range(PROMPTS)]
    own_N = np.full(PROMPTS, np.nan) if name == ABILITY else np.ones(PROMPTS)
    return EvaluatedPrompts(ids, ids, [""] * PROMPTS, features_NF, own_N, np.full(PROMPTS, 0.5))
