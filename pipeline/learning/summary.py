"""`summary.json`: what a run measured, for machines and for the report."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pipeline.data.sources.reader import first_records
from pipeline.evaluation.matrix import BASE, AccuracyMatrix, continual_metrics
from pipeline.evaluation.results import Evaluation
from pipeline.learning.session import StreamSession
from pipeline.provenance import provenance
from pipeline.routing.expert import ExpertCard

SAMPLES = 2
"""Sample prompts per task and benchmark in the report."""


def session_provenance(session: StreamSession, started: datetime) -> dict[str, Any]:
    """Returns the provenance of a run's summary, its base included."""
    made = provenance(session.config.name, started, seed=session.config.seed)
    return made | {"base": {"label": session.config.base.label, "fingerprint": session.fingerprint}}


def task_metrics(session: StreamSession, task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's part of the summary."""
    return {
        "seconds": metrics["seconds"],
        "expert_seconds": metrics["expert_seconds"],
        "router_seconds": metrics["router_seconds"],
        "step_seconds": sum(metrics["expert_step_seconds"]) + sum(metrics["router_step_seconds"]),
        "wait_seconds": metrics["expert_wait_seconds"] + metrics["router_wait_seconds"],
        "rows": int(metrics["rows"]),
        "samples": int(metrics["samples"]),
        "quarantined": int(metrics["quarantined"]),
        "lost_files": int(metrics["lost_files"]),
        "expert_loss": _curve(metrics["expert_losses"]),
        "router_loss": _curve(metrics["router_losses"]),
        **{
            name: metrics[key]
            for name, key in (
                ("validation_loss", "validation_losses"),
                ("validation_accuracy", "validation_accuracies"),
            )
            if key in metrics
        },
    }


def metrics_on_card(card: ExpertCard) -> dict[str, Any]:
    """Returns the training metrics on an expert's card; loss curves and row counts are not on it."""
    unknown: dict[str, Any] = {"seconds": 0.0, "wait_seconds": 0.0, "losses": [], "step_seconds": []}
    metrics = {
        f"{stage}_{what}": none for stage in ("expert", "router") for what, none in unknown.items()
    } | card.metrics
    seconds = metrics["expert_seconds"] + metrics["router_seconds"]
    return metrics | {"seconds": seconds, "samples": card.samples, "rows": 0, "quarantined": 0, "lost_files": 0}


def _curve(losses: Sequence[float], points: int = 100) -> list[list[float]]:
    """Returns [step, loss] pairs, thinned to about `points`."""
    every = max(1, len(losses) // points)
    return [[i + 1, round(loss, 4)] for i, loss in enumerate(losses) if i % every == 0 or i == len(losses) - 1]


def wait_share(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """Returns the share of step time in which training waited for data."""
    steps = sum(t["expert_seconds"] + t["router_seconds"] for t in tasks.values())
    return sum(t["wait_seconds"] for t in tasks.values()) / steps if steps else 0.0


def learned(
    session: StreamSession, matrix: AccuracyMatrix, last: Evaluation, tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the parts of the summary that describe what was learned."""
    names, evaluated = list(tasks), list(session.data.eval_tasks)
    experts = [*names, BASE]
    routing = {"experts": experts, "columns": evaluated, "shares": last.shares(experts, evaluated)}
    calibration = last.calibration(names)
    return {
        "tasks": dict(tasks),
        "data_wait_share": wait_share(tasks),
        "accuracy_matrix": matrix.to_json(),
        "continual": continual_metrics(matrix) | {"routing_accuracy": last.routing_accuracy(names)},
        "routing": routing,
        **({} if calibration is None else {"calibration": calibration}),
        "samples": samples(session, last),
    }


def answers(last: Evaluation, tasks: Sequence[str], generated: int) -> dict[str, int]:
    """Returns how many answers a run has `generated`, for how many prompts, and how many a single pass takes.

    A single pass: every prompt is answered once by the base, those of tasks once more by their expert.
    """
    prompts = {column: sum(result.experts.values()) for column, result in last.results.items()}
    single = sum(prompts.values()) + sum(prompts[task] for task in tasks)
    return {"generated": generated, "prompts": sum(prompts.values()), "single_pass": single}


def samples(session: StreamSession, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the first prompts of every task and benchmark with image, answer and chosen expert."""
    answered = {(p.task, p.id): p for p in evaluation.samples}
    shown = []
    for name, task in session.data.eval_tasks.items():
        for record in first_records(task.eval, session.data.demo_folder, task.prompt, SAMPLES):
            prediction = answered.get((name, record.id))
            if prediction is None:
                continue
            image = None
            if record.images:
                stream = io.BytesIO()
                picture = record.images[0]
                picture.thumbnail((256, 256))
                picture.save(stream, format="PNG")
                image = base64.b64encode(stream.getvalue()).decode()
            shown.append(
                {
                    "column": name,
                    "question": record.question,
                    "answer": prediction.answer,
                    "prediction": prediction.prediction,
                    "correct": prediction.score == 1.0,
                    "expert": prediction.expert,
                    "why": prediction.why,
                    "image": image,
                }
            )
    return shown
