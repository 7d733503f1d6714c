"""Evaluates a pool on prompts that were evaluated before, from their features and scores: no base, no data, no answers.

The pool's router chooses for each prompt. Where it chooses the task's expert or the base, the score is known; an answer of
another expert is not, and counts as wrong: the accuracy is a lower bound then. Where Linears choose, nothing can be said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.evaluation.choices import choices, routers_of
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.results import Evaluation, Prediction, TaskResult
from pipeline.registry.evaluated_prompts import EvaluatedPrompts
from pipeline.routing.pool import Pool
from pipeline.routing.routes import MIXED, NULL_EXPERT


@dataclass(frozen=True)
class RecordedEvaluation:
    """What recorded prompts say of a pool."""

    evaluation: Evaluation
    base: dict[str, float]
    """Accuracy of the frozen base alone, by task or base ability."""
    unknown: dict[str, int]
    """Prompts whose answer is not known and counts as wrong, where there are any."""
    undecided: list[str]
    """Those of which nothing can be said, since the router leaves the choice to the Linears."""


def evaluate_recorded(pool: Pool, recorded: Mapping[str, EvaluatedPrompts]) -> RecordedEvaluation:
    """Evaluates a pool on recorded prompts by task or base ability; leaves out those whose choices its router leaves open."""
    usable = {name: prompts for name, prompts in recorded.items() if prompts.features_NF.shape[1] == pool.width}
    if not usable:
        return RecordedEvaluation(Evaluation({}), {}, {}, [])
    features = [torch.from_numpy(np.array(prompts.features_NF)) for prompts in usable.values()]
    results, base, unknown, undecided = {}, {}, {}, []
    for (name, prompts), chosen in zip(
        usable.items(), choices(routers_of(pool), "routed", list(usable), features), strict=True
    ):
        if (chosen == MIXED).any():
            undecided.append(name)
            continue
        own = name if name in pool.names and name not in pool.retired else BASE
        experts = [BASE if c == NULL_EXPERT else pool.names[c] for c in chosen.tolist()]
        scores = [
            base_score if expert == BASE else own_score if expert == own else math.nan
            for expert, own_score, base_score in zip(
                experts, prompts.own_N.tolist(), prompts.base_N.tolist(), strict=True
            )
        ]
        results[name] = TaskResult.of(_predictions(name, prompts, scores, experts), own=own)
        base[name] = TaskResult.of(_predictions(name, prompts, prompts.base_N.tolist(), [BASE] * len(chosen))).accuracy
        if missing := sum(map(math.isnan, scores)):
            unknown[name] = missing
    return RecordedEvaluation(Evaluation(results), base, unknown, undecided)


def _predictions(name: str, prompts: EvaluatedPrompts, scores: list[float], experts: list[str]) -> list[Prediction]:
    rows = zip(prompts.ids, prompts.questions, prompts.groups, scores, experts, strict=True)
    return [
        Prediction(name, id, question, "", "", 0.0 if math.isnan(score) else score, expert, group=group)
        for id, question, group, score, expert in rows
    ]
