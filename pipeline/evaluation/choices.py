"""Routing choices that need no language model: who answers each prompt. Shapes: N prompts, F features."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.matrix import BASE
from pipeline.routing.call import Routers
from pipeline.routing.insight import Candidate, rank_candidates
from pipeline.routing.pool import Pool
from pipeline.routing.routes import NULL_EXPERT

Mode = Literal["routed", "oracle", "single"]
"""Who answers: `routed`, the expert that the pool's router chooses; `oracle`, each task's own expert, and the base for all
others (the upper bound); `single`, the pool's single expert for all."""

SHOWN = 2
"""Candidates that an answer's reason names."""

AT_ONCE = 32768
"""Prompts per batch of a router, which bounds its memory. Large, since each batch factorises every covariance."""


def routers_of(pool: Pool | None, before: Routers | None = None) -> Routers | None:
    """Returns the routers of a pool, made of another's if given (see `Routers`); None if the base answers everything."""
    return Routers(pool, before) if pool is not None and pool.experts else None


Ranking = tuple[torch.Tensor, torch.Tensor]
"""The prompt router's likeliest expert for each prompt of all tasks (N,), be it retired, and its log-posterior (N,)."""


def ranking(routers: Routers | None, mode: Mode, features: Sequence[torch.Tensor]) -> Ranking | None:
    """Ranks the prompts of all tasks at once: choices and calibrations rest on it, and it is what a large pool takes long for.

    None where something else than the prompt router decides.
    """
    if routers is None or mode != "routed" or routers.pool.router.kind != "prompt":
        return None
    ranked = [routers.prompts.rank_candidates(part_BF, 1) for part_BF in torch.cat(list(features)).split(AT_ONCE)]
    expert_N, log_posterior_N = (torch.cat(parts)[:, 0] for parts in zip(*ranked, strict=True))
    return expert_N, log_posterior_N


def choices(
    routers: Routers | None,
    mode: Mode,
    tasks: Sequence[str],
    features: Sequence[torch.Tensor],
    ranked: Ranking | None = None,
) -> list[np.ndarray]:
    """Returns per task who answers its prompts (N,): index in the pool, NULL_EXPERT (the base), or MIXED.

    `features` are those of each task's prompts (N, F), `ranked` their `ranking`, where somebody has it.
    """
    counts = [len(features_NF) for features_NF in features]
    if routers is None:
        return [np.full(count, NULL_EXPERT) for count in counts]
    if mode == "routed":
        if ranked is not None:
            choices_N = routers.prompts.in_use(ranked[0][:, None])[:, 0].numpy()
        else:
            parts = torch.cat(list(features)).split(AT_ONCE)
            choices_N = torch.cat([routers.router.choices(part_BF) for part_BF in parts]).numpy()
        return np.split(choices_N, np.cumsum(counts)[:-1])
    names = routers.pool.names
    experts = [0 if mode == "single" else names.index(c) if c in names else NULL_EXPERT for c in tasks]
    return [np.full(count, expert) for count, expert in zip(counts, experts, strict=True)]


def calibrations(
    names: Sequence[str], owners: Sequence[str], counts: Sequence[int], ranked: Ranking | None
) -> list[Calibration | None]:
    """Returns per task how sure the prompt router was of its choices, and how often these were right.

    `names` are the pool's experts, `owners` who should answer each task's prompts (one of them, or the base), `counts` how many
    prompts each task has. None where something else decides.
    """
    if ranked is None:
        return [None] * len(counts)
    found = list[Calibration | None]()
    by_task = zip(owners, *(part_N.split(list(counts)) for part_N in ranked), strict=True)
    for owner, chosen_N, log_posterior_N in by_task:
        own = NULL_EXPERT if owner == BASE else names.index(owner)
        # The digits after these differ by what is computed at once.
        posterior_N = log_posterior_N.exp().round(decimals=9)
        found.append(Calibration.of(posterior_N.numpy(), (chosen_N == own).numpy()))
    return found


def reasons(routers: Routers | None, mode: Mode, features_NF: torch.Tensor) -> list[str]:
    """Returns the router's reason for each prompt; empty without routing."""
    if routers is None or mode != "routed":
        return [""] * len(features_NF)
    no_weights: list[dict[str, float]] = [{}] * len(features_NF)  # not a part of the reason
    ranked = rank_candidates(routers.prompts, routers.pool.names, features_NF, no_weights, limit=SHOWN)
    return [format_candidates(candidates) for candidates in ranked]


def format_candidates(candidates: Sequence[Candidate]) -> str:
    """Formats the likeliest candidates with posterior and Mahalanobis distance to their tasks."""
    parts = []
    for candidate in candidates[:SHOWN]:
        part = f"{candidate.name or BASE} {candidate.posterior:.1%}"
        if candidate.distance is not None and candidate.threshold is not None:
            part += f" (distance {min(candidate.distance, 999):.2f}, threshold {candidate.threshold:.2f})"
        if candidate.by_text:
            part += " (by text alone)"
        parts.append(part)
    return ", ".join(parts)
