"""Memory of a worker that does not depend on the batch: weights, gradients, optimizer, buffers; with ZeRO and offload.

ZeRO (arXiv 1910.02054, sections 3 and 5) shards states over N workers: stage 1 the optimizer's, stage 2 also gradients, stage
3 also weights, including those of the frozen base. ZeRO-Offload and ZeRO-Infinity (arXiv 2101.06840,
2104.07857) move shards to CPU memory. Buffers are those that DeepSpeed 0.19 allocates; its defaults
(deepspeed.ai/docs/config-json) suit full training and are large beside an adapter.

Symbols: B parameters of the frozen base, P of the adapter, w and a bytes of a base's and an adapter's weight, N workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config import TrainingConfig

BUCKET, LIVE = "reduce_bucket_size", "stage3_max_live_parameters"
DEFAULTS = {BUCKET: 500_000_000, LIVE: 1_000_000_000}
"""DeepSpeed's defaults, in parameters."""


@dataclass(frozen=True)
class States:
    """Bytes per worker, without activations."""

    weights: int
    """Frozen weights that stay on the GPU."""
    gathered: int
    """ZeRO-3: peak of gathered weights."""
    adapter: int
    """Adapter weights."""
    gradients: int
    """Adapter gradients."""
    optimizer: int
    """AdamW's states, and its float32 weights."""
    bucket: int
    """Buffer for communicating gradients."""
    bucket_stays: bool
    """Whether the bucket stays allocated (ZeRO-3), or exists only in the backward pass."""
    step: int
    """Temporary, while the optimizer steps."""
    cpu: Mapping[str, int]
    """Offloaded to CPU memory, by name."""


def states(
    *,
    base: int,
    adapter: int,
    training: TrainingConfig,
    weight_bytes: int,
    adapter_bytes: int,
    zero: Mapping[str, Any],
    gpu: bool = True,
) -> States:
    """Returns the bytes per worker.

    frozen weights   w B; ZeRO-3 w B / N, and at most `stage3_max_live_parameters` whole at a time
    adapter          a P; under ZeRO-3 too, since most of its tensors are below `stage3_param_persistence_threshold`
    gradients        a P; from ZeRO-2 on a P / N
    optimizer        8 P for AdamW's moments, and 4 P for float32 weights in bf16 training or under ZeRO-1 and 2; / N
                     from ZeRO-1 on
    bucket           a x `reduce_bucket_size` from ZeRO-1 on: in the backward pass, under ZeRO-3 all the time; on CPUs no more
                     of it than is used, a P
    step             the gradient in float32 and one temporary: 8 P (/ N)

    `zero` is the `zero_optimization` group of DeepSpeed's configuration.
    """
    stage, workers, offload = training.zero_stage, training.workers, training.offload
    sizes = DEFAULTS | {name: int(zero[name]) for name in DEFAULTS if name in zero}
    shards = workers if stage >= 1 else 1
    frozen = weight_bytes * base // (workers if stage == 3 else 1)
    masters = 4 if training.precision == "bf16" or stage in (1, 2) else 0
    optimizer = (8 + masters) * adapter // shards
    step = 8 * adapter // shards
    cpu = {}
    if offload != "none":
        cpu["optimizer states"], optimizer = optimizer + 4 * adapter // shards, 0
        step = 0
    if offload == "all":
        cpu["frozen weights"], frozen = frozen, 0
    return States(
        weights=frozen,
        gathered=weight_bytes * min(base, sizes[LIVE]) if stage == 3 else 0,
        adapter=adapter_bytes * adapter,
        gradients=adapter_bytes * adapter // (workers if stage >= 2 else 1),
        optimizer=optimizer,
        bucket=adapter_bytes * (sizes[BUCKET] if gpu else min(sizes[BUCKET], adapter)) if stage else 0,
        bucket_stays=stage == 3,
        step=step,
        cpu=cpu,
    )
