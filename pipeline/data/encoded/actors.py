"""Inference on Ray Data: every worker holds a base and maps batches of rows; rows keep their order."""

from typing import Any

import ray
from ray.data import ActorPoolStrategy

from pipeline.config import BaseModelConfig
from pipeline.models.inference import FrozenBase, InferenceWorkers


def on_workers(
    rows: ray.data.Dataset,
    actor: type[FrozenBase],
    base: BaseModelConfig,
    *arguments: Any,
    workers: InferenceWorkers,
    rows_at_once: int,
) -> ray.data.Dataset:
    """Maps batches of `rows_at_once` rows by `actor(base, workers, *arguments)`, built once per worker."""
    if workers.count > 1:  # a small source is a single block, and one worker would read it alone
        rows = rows.repartition(target_num_rows_per_block=rows_at_once)
    return rows.map_batches(
        actor,
        fn_constructor_args=(base, workers, *arguments),
        batch_size=rows_at_once,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=workers.count),
        num_gpus=workers.gpus or None,
        num_cpus=workers.cpus_per_worker,
    )
