"""A plan for a configuration, its metrics in `plan.json`, and the formulas behind them."""

import inspect
from dataclasses import replace
from typing import Any

import psutil

from pipeline.config import ConfigError, LearnConfig
from pipeline.planning import activations, compute, inference, sizes, states
from pipeline.planning.advice import Change, largest_micro_batch
from pipeline.planning.architecture import Architecture
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.gpus import GPUS
from pipeline.planning.job import job_fits, job_moments, served_pool, worst_moment
from pipeline.planning.plan import CONTEXT, FRAGMENTATION, Plan

POOLS = (10, 50, 100)
"""Numbers of experts for which the pool's size is reported beside the stream's own."""

EXPLAINED = {
    activations: (
        "layer_bytes",
        "attention_bytes",
        "mask_bytes",
        "logits_bytes",
        "final_norm_bytes",
        "backward_bytes",
        "vision_bytes",
    ),
    states: ("states",),
    inference: ("reading_bytes", "cache_bytes", "answer_bytes"),
    compute: ("operations", "vision_operations", "gathering_seconds", "answering_seconds"),
    sizes: ("sizes",),
}
"""Functions whose docstrings are the formulas, by module."""


def check_gpu(name: str | None) -> None:
    """Raises ConfigError for the name of an unknown GPU."""
    if name is not None and name not in GPUS:
        raise ConfigError(f"--gpu {name}: not known; choose one of {', '.join(GPUS)}")


def smallest_gpu(config: LearnConfig, architecture: Architecture, assumptions: Assumptions) -> str | None:
    """Returns the GPU with the least memory that holds the job, the largest where none does; None for CPUs."""
    if not config.training.gpu:
        return None
    by_memory = sorted(GPUS, key=lambda name: GPUS[name].memory)
    plans = ((name, make_plan(config, architecture, gpu=name, assumptions=assumptions)) for name in by_memory)
    return next((name for name, plan in plans if job_fits(plan)), by_memory[-1])


def make_plan(
    config: LearnConfig,
    architecture: Architecture,
    *,
    gpu: str | None = None,
    assumptions: Assumptions | None = None,
    link: float | None = None,
) -> Plan:
    """Returns the plan of a stream over a base on CPUs, or on GPUs of that name.

    `link` is in GB/s between workers, if that is slower than the GPU's own.
    """
    spec = GPUS[gpu] if gpu else None
    if spec and link is not None:
        spec = replace(spec, link=1e9 * link)
    capacity = spec.memory if spec else psutil.virtual_memory().total / config.training.workers
    return Plan(config, architecture, spec, capacity, assumptions or Assumptions())


def summary(plan: Plan, gpu: str | None, changes: list[Change]) -> dict[str, Any]:
    """Returns the plan as JSON values; names of keys hold SI units."""
    config, architecture, disk, operations = plan.config, plan.architecture, plan.sizes, plan.operations
    moment, peak = plan.peak(plan.longest)
    worst = worst_moment(plan)
    return {
        "base": {"label": config.base.label, "kind": architecture.model_type},
        "gpu": {"name": gpu, "memory_bytes": plan.capacity, "workers": config.training.workers},
        "assumptions": vars(plan.assumptions) | {"context_bytes": CONTEXT, "fragmentation": FRAGMENTATION},
        "parameters": {
            "frozen": dict(architecture.parameters),
            "trained": architecture.adapter_parameters(config.expert.rank),
            "routing_vectors": architecture.vector_parameters,
            "adapted_linears": len(architecture.adapted),
        },
        "step": {
            "rows": plan.rows_per_step,
            "micro_batch": plan.micro_batch,
            "accumulated": plan.accumulated,
            "typical_row_tokens": plan.typical.tokens,
            "longest_row_tokens": plan.longest.tokens,
            "typical_row_logits": plan.typical.answer_tokens,
            "longest_row_logits": plan.longest.answer_tokens,
            "tokens": plan.rows_per_step * plan.typical.tokens,
            "operations": plan.rows_per_step * operations.total,
            "operations_of_a_row": vars(operations),
            "attention": plan.kernel,
            "seconds": plan.step_seconds,
            "gathering_seconds": plan.gathering_seconds,
        },
        "memory": {
            "fits": job_fits(plan),
            "worst_moment": worst.name,
            "worst_moment_bytes": worst.bytes,
            "job": [
                {"moment": m.name, "when": m.when, "gpus": m.gpus, "bytes": m.bytes, "parts": dict(m.parts)}
                for m in (*job_moments(plan), served_pool(plan))
            ],
            "peak_bytes": peak,
            "peak_moment": moment,
            "longest_row_bytes": plan.moments(plan.longest),
            "typical_row_bytes": plan.moments(plan.typical),
            "cpu_bytes": plan.cpu,
            "largest_micro_batch": largest_micro_batch(plan),
            "advice": [{"settings": dict(c.settings), "peak_bytes": c.bytes, "fits": c.fits} for c in changes],
        },
        "hours": {
            "expert_stage_seconds": plan.expert_seconds,
            "router_stage_seconds": plan.router_seconds,
            "row_features_gpu_seconds": plan.caching_seconds,
            "evaluation_gpu_seconds": plan.evaluation_seconds,
            "stream_gpu_seconds": plan.gpu_seconds,
            "training_clock_seconds": plan.clock_seconds,
        },
        "disk": {
            "adapter_bytes": disk.adapter,
            "vectors_bytes": disk.vectors,
            "statistics_bytes": disk.statistics,
            "expert_bytes": disk.expert,
            "pool_bytes": {str(n): disk.pool(n) for n in (len(config.stream.tasks), *POOLS)},
            "checkpoint_bytes": disk.checkpoint,
            "row_features_bytes": disk.row_features,
        },
    }


def formulas() -> str:
    """Returns the formulas of a plan: the docstrings of `EXPLAINED`."""
    parts = []
    for module, names in EXPLAINED.items():
        parts.append(inspect.cleandoc(module.__doc__ or ""))
        parts += [f"{name}: {inspect.getdoc(getattr(module, name))}" for name in names]
    return "\n\n".join(parts) + "\n"
