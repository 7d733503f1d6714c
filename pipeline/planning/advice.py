"""Changes of settings that make a plan fit, cheapest first; each is on top of those before."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.planning.job import worst_inference
from pipeline.planning.plan import Plan

NOTICEABLE = 0.005
"""Least saving, as a share of the peak, of an advised setting."""


@dataclass(frozen=True)
class Change:
    """Settings to change, and the memory needed with them."""

    settings: Mapping[str, Any]
    moment: str
    bytes: int
    fits: bool

    def __str__(self) -> str:
        """Returns the settings as overrides."""
        return " ".join(f"{field}={str(value).lower()}" for field, value in self.settings.items())


def changed(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """Returns the plan with other settings, given by dotted name."""
    config = plan.config
    for field, value in settings.items():
        group, name = field.split(".")
        config = config.model_copy(update={group: getattr(config, group).model_copy(update={name: value})})
    return replace(plan, config=config)


def advice(plan: Plan) -> list[Change]:
    """Returns changes that make a job fit: none if it fits, all if they do not suffice. Training first, then inference.

    For training in this order: attention that keeps no matrix, cached image features, a smaller micro-batch (a row of a
    thousand tokens keeps a GPU busy by itself), gradient checkpointing (50 % more operations), ZeRO-3 and offload to CPU memory
    (as slow as their links). All give the same adapter, up to rounding. Settings that save nothing here are left out.
    """
    changes: list[Change] = []
    for suggest in (_attention, _vision, _micro_batch, _checkpointing, _zero, _offload):
        if plan.fits:
            break
        settings = suggest(plan)
        if settings is None:
            continue
        after = changed(plan, settings)
        before, (moment, needed) = plan.peak(plan.longest)[1], after.peak(after.longest)
        if needed <= (1 - NOTICEABLE) * before:
            changes.append(Change(settings, moment, needed, after.fits))
            plan = after
    return changes + inference_advice(plan)


FEWEST_TOKENS = 2048
"""Tokens of the smallest batch that is advised: smaller ones leave a GPU idle."""

MOST_GPUS = 16
"""Most GPUs per base that are advised."""


def inference_advice(plan: Plan) -> list[Change]:
    """Returns changes that make evaluation, base prompts and image embeddings fit: smaller batches, then more GPUs per base.

    More GPUs per evaluator mean fewer evaluators, since the GPUs are those of training. Empty if all fit; the last attempt if
    nothing suffices.
    """
    evaluation, change = plan.config.evaluation, None
    if worst_inference(plan).bytes <= plan.capacity:
        return []
    gpus = evaluation.gpus_per_worker
    while gpus <= (MOST_GPUS if plan.gpu is not None else evaluation.gpus_per_worker):
        tokens = evaluation.tokens_per_batch
        while tokens >= min(FEWEST_TOKENS, evaluation.tokens_per_batch):
            settings: dict[str, Any] = {}
            if gpus > evaluation.gpus_per_worker:
                fewer = max(1, evaluation.workers * evaluation.gpus_per_worker // gpus)
                settings |= {"evaluation.gpus_per_worker": gpus, "evaluation.workers": fewer}
            if tokens < evaluation.tokens_per_batch:
                settings["evaluation.tokens_per_batch"] = tokens
            worst = worst_inference(changed(plan, settings))
            change = Change(settings, worst.name, worst.bytes, worst.bytes <= plan.capacity)
            if change.fits:
                return [change]
            tokens //= 2
        gpus *= 2
    return [change] if change is not None and change.settings else []


def largest_micro_batch(plan: Plan) -> int | None:
    """Returns the largest micro-batch that divides a worker's share and fits, other settings as they are; or None."""
    for rows in range(plan.share, 0, -1):
        if plan.share % rows == 0 and changed(plan, {"training.micro_batch": rows}).fits:
            return rows
    return None


def _attention(plan: Plan) -> dict[str, Any] | None:
    return {"base.attention": "sdpa"} if plan.config.base.attention == "eager" else None


def _vision(plan: Plan) -> dict[str, Any] | None:
    return {"data.vision_cache": "features"} if plan.architecture.cacheable and not plan.cached_vision else None


def _checkpointing(plan: Plan) -> dict[str, Any] | None:
    return None if plan.config.training.gradient_checkpointing else {"training.gradient_checkpointing": True}


def _micro_batch(plan: Plan) -> dict[str, Any] | None:
    rows = largest_micro_batch(plan) or 1
    return {"training.micro_batch": rows} if rows < plan.micro_batch else None


def _zero(plan: Plan) -> dict[str, Any] | None:
    training = plan.config.training
    return {"training.zero_stage": 3} if training.zero_stage < 3 and training.workers > 1 else None


def _offload(plan: Plan) -> dict[str, Any] | None:
    training = plan.config.training
    settings = {"training.zero_stage": 3, "training.offload": "all"}
    return (
        None
        if training.offload == "all"
        else {k: v for k, v in settings.items() if k != "training.zero_stage" or training.zero_stage < 3}
    )
