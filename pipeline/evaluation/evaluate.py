"""Answers evaluation prompts with a pool, on Ray Data, and scores them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import ray

from pipeline.config import BaseModelConfig, TaskConfig
from pipeline.evaluation.metrics import METRICS
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.routing.insight import Candidate, weighed
from pipeline.routing.pool import Pool
from pipeline.routing.routed_model import RoutedModel
from pipeline.streams.actors import on_workers
from pipeline.streams.packing import unpack
from pipeline.streams.records import Reference

BASE = "base"
"""What stands for the base among experts."""


SHOWN = 2
"""Candidates that an answer's reason names."""

KEPT = ("column", "id", "question", "reference")
"""Columns of a row that an answer keeps."""


@dataclass(frozen=True)
class Prediction:
    """One answered prompt."""

    column: str
    """Task or foundation family it belongs to."""
    id: str
    question: str
    answer: str
    """First accepted answer."""
    prediction: str
    score: float
    """By the task's metric, 0 to 1."""
    expert: str
    """Expert with the largest weight, or `base`."""
    why: str = ""
    """Where a router chose: the likeliest candidates with their figures."""
    group: str = ""
    """Predictions of one group in a column are one question; empty: a question of its own."""


@dataclass(frozen=True)
class Evaluation:
    """All answered prompts of one evaluation."""

    predictions: list[Prediction]

    def accuracies(self) -> dict[str, float]:
        """Returns the accuracy of every column: the mean over its questions of the worst of their predictions.

            A[c] = 1/|Q_c| · Σ_{q in Q_c} min_{p in q} score(p)

        Q_c: the predictions of column c, divided into their groups; one without a group is a question of its own, so that
        without groups A[c] is the mean score. With one group for the rotations of a multiple-choice question this is
        CircularEval: right only if all are. Source: Liu et al. 2023 (MMBench), arXiv 2307.06281.
        """
        worst: dict[str, dict[str | int, float]] = {}
        for number, p in enumerate(self.predictions):
            questions, question = worst.setdefault(p.column, {}), p.group or number
            questions[question] = min(p.score, questions.get(question, p.score))
        return {column: fmean(questions.values()) for column, questions in worst.items()}

    def row_accuracies(self) -> dict[str, float]:
        """Returns the mean score over the predictions, groups or not, of every column that has groups.

        With rotations as groups: the accuracy that asking each rotation alone would have shown (MMBench's VanillaEval
        asks only the first).
        """
        scores: dict[str, list[float]] = {p.column: [] for p in self.predictions if p.group}
        for p in self.predictions:
            if p.column in scores:
                scores[p.column].append(p.score)
        return {column: fmean(values) for column, values in scores.items()}

    def routing_accuracy(self, tasks: Sequence[str]) -> float:
        """Returns the share of prompts answered by the right one: a task's by its expert, others by the base."""
        right = [p.expert == (p.column if p.column in tasks else BASE) for p in self.predictions]
        return float(np.mean(right))

    def shares(self, experts: Sequence[str], columns: Sequence[str]) -> list[list[float]]:
        """Returns the share of each column's prompts that went to each expert (experts x columns)."""
        counts = np.zeros((len(experts), len(columns)))
        for p in self.predictions:
            counts[experts.index(p.expert), columns.index(p.column)] += 1
        return (counts / np.maximum(counts.sum(0), 1)).tolist()


def evaluate(
    rows: ray.data.Dataset,
    tasks: Mapping[str, TaskConfig],
    *,
    base: BaseModelConfig,
    pool: Path | None,
    max_new_tokens: int,
    workers: InferenceWorkers,
    vision: bool = True,
    mode: Literal["routed", "told", "only"] = "routed",
) -> Evaluation:
    """Answers encoded prompts and scores each by the metric of its task.

    `pool` is a pool's folder, None evaluates the bare base. `mode`: `routed`, by the pool's router; `told`, each task's
    prompts by its own expert and all others by the base (the upper bound); `only`, everything by the pool's single expert.
    """
    answered = on_workers(
        rows,
        Predictor,
        base,
        str(pool) if pool else None,
        mode,
        max_new_tokens,
        vision,
        workers=workers,
        rows_at_once=workers.batch_size,
    )
    predictions = [p for batch in answered.iter_batches(batch_format="numpy") for p in score(batch, tasks)]
    return Evaluation(predictions)


def score(batch: Mapping[str, np.ndarray], tasks: Mapping[str, TaskConfig]) -> list[Prediction]:
    """Scores a batch that a `Predictor` has answered, each row by its task's metric."""
    scored = []
    for column, row, question, accepted, prediction, expert, why in zip(
        *(batch[key] for key in (*KEPT, "prediction", "expert", "why")), strict=True
    ):
        reference = Reference.model_validate_json(accepted)
        value = METRICS[tasks[column].metric](prediction, reference)
        answer, group = reference.answers[0], reference.group
        scored.append(Prediction(column, row, question, answer, prediction, value, expert, why, group))
    return scored


class Predictor(FrozenBase):
    """Holds base and pool, answers batch after batch."""

    def __init__(
        self,
        base: BaseModelConfig,
        workers: InferenceWorkers,
        pool: str | None,
        mode: str,
        max_new_tokens: int,
        vision: bool = True,
    ) -> None:
        super().__init__(base, workers, vision=vision)
        self.mode, self.max_new_tokens = mode, max_new_tokens
        self.routed: RoutedModel | None = None
        if pool:
            self.attach(Pool.load(pool))

    def attach(self, pool: Pool) -> None:
        """Answers with `pool` from now on, instead of the pool before."""
        if self.routed is not None:
            self.routed.detach()
        self.routed = RoutedModel(self.base.model, pool)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Adds `prediction` and `expert` to the batch's `column`, `id`, `question` and `reference`."""
        encoded = unpack(batch)
        predictions, experts, reasons = [""] * len(encoded), [BASE] * len(encoded), [""] * len(encoded)
        for forced, group in self._groups(list(batch["column"])):
            for members, rows in self.batches([encoded[i] for i in group]):
                answered = zip(members, *self._answer(rows, forced), strict=True)
                for member, text, expert, reason in answered:
                    i = group[member]
                    predictions[i], experts[i], reasons[i] = text, expert, reason
        kept = {key: batch[key] for key in KEPT}
        added = {"prediction": predictions, "expert": experts, "why": reasons}
        return kept | {key: np.array(values, object) for key, values in added.items()}

    def _groups(self, columns: list[str]) -> list[tuple[str | None, list[int]]]:
        """Splits a batch by the expert that must answer: None for the router's choice."""
        if self.routed is None or self.mode == "routed":
            return [(None, list(range(len(columns))))]
        names = self.routed.pool.names
        wanted = [names[0] if self.mode == "only" else column if column in names else BASE for column in columns]
        return [(name, [i for i, w in enumerate(wanted) if w == name]) for name in dict.fromkeys(wanted)]

    def _answer(self, rows: list[Any], forced: str | None) -> tuple[list[str], list[str], list[str]]:
        """Returns answers, who gave them, and why (empty where it was not the router's choice)."""
        nothing = [""] * len(rows)
        if self.routed is None:
            return self.answer(rows, self.max_new_tokens), [BASE] * len(rows), nothing
        if forced is not None:
            with self.routed.forced(None if forced == BASE else forced):
                return self.answer(rows, self.max_new_tokens), [forced] * len(rows), nothing
        with self.routed.call() as call:
            texts = self.answer(rows, self.max_new_tokens)
        chosen = [decision.expert or BASE for decision in call.decisions]
        why = [in_short(candidates) for candidates in weighed(call, limit=SHOWN)]
        return texts, chosen, why or nothing


def in_short(candidates: Sequence[Candidate]) -> str:
    """Writes the likeliest candidates with their probability, and how far the prompt lies from their tasks."""
    parts = []
    for candidate in candidates[:SHOWN]:
        part = f"{candidate.name or BASE} {candidate.posterior:.1%}"
        if candidate.distance is not None and candidate.radius is not None:
            part += f" (distance {min(candidate.distance, 999):.2f}, radius {candidate.radius:.2f})"
        parts.append(part)
    return ", ".join(parts)
