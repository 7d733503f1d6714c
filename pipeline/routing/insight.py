"""Why an expert answers a prompt: candidate experts with posterior and distance, and the weights per token.

Shapes: B rows, T tokens, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.routing.call import Call, Decision
from pipeline.routing.pool import PoolError
from pipeline.routing.prompt_router import CANDIDATES, PromptRouter
from pipeline.routing.routed_model import RoutedModel
from pipeline.routing.routes import NULL_EXPERT


@dataclass(frozen=True)
class Candidate:
    """One expert, or the base, as the routers saw it for one prompt."""

    name: str | None
    """None is the base."""
    posterior: float
    """Probability by the prompt router, among all classes."""
    score: float | None
    """Log-likelihood, relative to the best class's 0; None for the base without a null expert."""
    distance: float | None
    """Own squared distance of the prompt from this task, per feature (about 1 for its own prompts); None for the base, and by
    text alone."""
    threshold: float | None
    """Distance up to which a prompt counts as this task's, where no null expert stands for the rest."""
    weight: float
    """Share in the answer, over all Linears and prompt tokens."""
    retired: bool = False
    """Whether the base answers in its place."""
    by_text: bool = False
    """Whether it is judged by the prompt's text alone: it never saw prompts with an image, or never one without."""

    @property
    def inside(self) -> bool | None:
        """Whether the prompt lies within the task's threshold."""
        return None if self.distance is None or self.threshold is None else self.distance <= self.threshold


@dataclass(frozen=True)
class Explanation:
    """Why one prompt was answered as it was."""

    decision: Decision
    """Who answered."""
    candidates: tuple[Candidate, ...]
    """Candidate experts, likeliest first."""
    weights: Mapping[str, Tensor]
    """By Linear: weight of each of the pool's experts at each prompt token (T, E), padding left out."""
    experts: tuple[str, ...]
    """Names along E."""

    @property
    def reason(self) -> str:
        """One sentence."""
        best, *others = self.candidates
        who = self.decision.expert or "the base"
        if best.retired and self.decision.expert is None:
            return f"the base: the prompt is {best.name}'s ({best.posterior:.1%} likely), which is retired"
        if self.decision.expert != best.name:
            return f"{who}, by the Linears' own choice: the prompt alone speaks for {best.name or 'the base'}"
        if best.name is None and best.score is None:
            near = min((c for c in others if c.inside is False), key=_excess)
            return (
                f"the base: beyond the threshold of every likely task; nearest is {near.name} "
                f"({near.distance:.2f} > {near.threshold:.2f})"
            )
        if not others:
            return f"{who}: nobody else is there"
        alone = ", by the text alone, since it never saw prompts of this kind" if best.by_text else ""
        other = f"{others[0].name or 'the base'} with {others[0].posterior:.1%}"
        return f"{who}: {best.posterior:.1%} likely{alone}, before {other}"


def _excess(candidate: Candidate) -> float:
    assert candidate.distance is not None
    return candidate.distance / max(candidate.threshold or 0.0, 1e-9)


@torch.inference_mode()
def candidates_of_call(call: Call, *, limit: int = 10) -> list[tuple[Candidate, ...]]:
    """Returns the candidate experts of each prompt of a call, likeliest first.

    The `limit` likeliest experts, and always the base. Empty where no prompt was read, where the pool has no expert, and
    where the call is over and its pool was replaced.
    """
    routers, features_BF = call.routers, call.features_BF
    if routers is None or features_BF is None or not routers.pool.experts:
        return []
    weights = [decision.weights for decision in call.decisions]
    return rank_candidates(routers.prompts, routers.pool.names, features_BF.cpu(), weights, limit=limit)


def rank_candidates(
    prompts: PromptRouter,
    names: Sequence[str],
    features_BF: Tensor,
    weights: Sequence[Mapping[str, float]],
    *,
    limit: int = 10,
) -> list[tuple[Candidate, ...]]:
    """Returns the `limit` likeliest experts of each prompt, and always the base, likeliest first.

    `names` are those of the router's experts, `weights` each prompt's shares in its answer, where it has one.
    """
    listed_BM, posterior_BM = prompts.rank_candidates(features_BF, len(prompts.experts) + 1)
    scores_BC = prompts.scores(features_BF, candidates=max(limit, CANDIDATES))
    scores_BC = scores_BC - scores_BC.max(-1, keepdim=True).values
    posteriors = [
        dict(zip(listed, row, strict=True))
        for listed, row in zip(listed_BM.tolist(), posterior_BM.exp().tolist(), strict=True)
    ]
    everybody = range(len(names))
    ranked = [
        [e for _, _, e in sorted((-p.get(e, 0.0), -s[e], e) for e in everybody)[:limit]]
        for p, s in zip(posteriors, scores_BC.tolist(), strict=True)
    ]
    distances, by_text = _distances(prompts, features_BF, ranked), prompts.by_text_alone(features_BF).tolist()
    candidates_by_prompt = []
    for row, best in enumerate(ranked):
        score, weight = scores_BC[row].tolist(), weights[row]
        listed = [
            Candidate(
                name=names[e],
                posterior=posteriors[row].get(e, 0.0),
                score=score[e],
                distance=None if by_text[row][e] else distances[row, e],
                threshold=prompts.experts[e].threshold,
                weight=weight.get(names[e], 0.0),
                retired=e in prompts.retired,
                by_text=by_text[row][e],
            )
            for e in best
        ]
        rest, base = max(0.0, 1 - sum(weight.values())), posteriors[row].get(NULL_EXPERT, 0.0)
        listed.append(Candidate(None, base, score[-1] if prompts.null else None, None, None, rest))
        candidates_by_prompt.append(tuple(sorted(listed, key=lambda c: -c.posterior)))
    return candidates_by_prompt


def _distances(
    prompts: PromptRouter, features_BF: Tensor, ranked: Sequence[Sequence[int]]
) -> dict[tuple[int, int], float]:
    """Returns the own distance by row and expert, of each row's ranked experts only: a solve costs F x F."""
    rows: dict[int, list[int]] = {}
    for row, best in enumerate(ranked):
        for expert in best:
            rows.setdefault(expert, []).append(row)
    return {
        (row, expert): distance
        for expert, of_expert in rows.items()
        for row, distance in zip(
            of_expert,
            prompts.experts[expert].distance(features_BF[of_expert], shrinkage=prompts.shrinkage).tolist(),
            strict=True,
        )
    }


@torch.inference_mode()
def explain(routed: RoutedModel, inputs: Mapping[str, Any], *, limit: int = 10) -> list[Explanation]:
    """Runs prompts (model inputs, without labels) once and says for each row who would answer, and why.

    `limit`: how many of the likeliest experts are listed; the base is always listed. Raises PoolError for an empty pool.
    """
    if not routed.pool.experts:
        raise PoolError("the pool is empty: the base answers everything; `pointsman learn` adds experts")
    with routed.call(traced=True) as call:
        routed.model(**inputs, use_cache=False)
        candidates_B = candidates_of_call(call, limit=limit)
    assert call.state.tokens_BT is not None
    names = call.names
    layer_weights, traces, tokens_BT = call.state.layer_weights, call.state.traces or {}, call.state.tokens_BT
    explanations = []
    for row, (decision, candidates) in enumerate(zip(call.decisions, candidates_B, strict=True)):
        kept_T = tokens_BT[row].bool().cpu()
        answer_E = torch.tensor([decision.weights.get(name, 0.0) for name in names])
        weights = {}
        for path in call.paths:
            if path in traces:
                weights[path] = traces[path][row].cpu()[kept_T]
            else:
                layer_E = layer_weights[path][row].cpu() if path in layer_weights else answer_E
                weights[path] = layer_E.expand(int(kept_T.sum()), -1)
        explanations.append(Explanation(decision, candidates, weights, tuple(names)))
    return explanations
