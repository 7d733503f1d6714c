"""A trained expert's statistics, taken anew without training: by another feature rule, or other router settings.

One pass over distinct training prompts, on workers that do inference; each reads its own share of the rows. The features are
those that training records. The inputs of the Linears are read behind the trained gates; training reads them while the gates
still move.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.data.loading.batch_loader import distinct_batches
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.errors import UserError
from pipeline.models.encoding import without_answer
from pipeline.models.inference import InferenceWorkers
from pipeline.routing.adapters import Adapter
from pipeline.routing.expert import Expert
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.trained import TrainedExpert
from pipeline.training.gates import with_gates, without_gates
from pipeline.training.null_expert import FEATURES, IDS, StatisticsCollector
from pipeline.training.session import FEWEST_ROWS

ROWS_AT_ONCE = 16
"""Rows that a worker holds at a time, their images decoded."""


class StatisticsError(UserError):
    """Rows of which no statistics can be taken; nothing was changed."""


def recomputed(
    expert: TrainedExpert,
    rows: TrainingRows,
    base: BaseModelConfig,
    router: RouterConfig,
    *,
    identity: Mapping[str, Any],
    seed: int,
    targets: str,
    workers: InferenceWorkers,
    vision: bool = True,
) -> Expert:
    """Returns `expert` with statistics of its task's `rows` by `router`'s settings; `identity` says what it then depends on.

    Of more than `router.statistics_rows` rows those are read that training with `seed` would choose. `targets` is the regular
    expression of the Linears that experts adapt, or `auto`; without `vision` the rows hold image features. Raises
    StatisticsError where rows are too few.
    """
    if rows.count < FEWEST_ROWS:
        raise StatisticsError(
            f"task {expert.card.task!r}: {rows.count} rows are too few for its statistics; at least {FEWEST_ROWS} are needed"
        )
    actor: Any = ray.remote(num_cpus=workers.cpus_per_worker, num_gpus=workers.gpus)(GatedCollector)
    actors = [actor.remote(base, workers, router.feature_width, targets, vision) for _ in range(workers.count)]
    try:
        trained = ray.put((dict(expert.adapters), dict(expert.vectors)))
        shares = ray.get([
            a.collect_share.remote(trained, rows, count=router.statistics_rows, rank=rank, workers=len(actors), seed=seed)
            for rank, a in enumerate(actors)
        ])  # fmt: skip
    finally:
        for a in actors:
            ray.kill(a)
    samples = _joined([share for share in shares if share])
    features, ids = samples.pop(FEATURES), samples.pop(IDS)
    statistics = PromptStatistics.of(features, ids, quantile=router.quantile, shrinkage=router.shrinkage)
    layer_statistics = {path: PromptStatistics.of(samples_NF) for path, samples_NF in samples.items()}
    return expert.described(statistics, layer_statistics, identity=identity)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.concatenate([part[key] for part in parts])) for key in parts[0]}


class GatedCollector(StatisticsCollector):
    """Reads the prompts of training rows with an expert behind its gates, as the router stage has left them."""

    def collect_share(
        self,
        trained: tuple[dict[str, Adapter], dict[str, Tensor]],
        rows: TrainingRows,
        *,
        count: int,
        rank: int,
        workers: int,
        seed: int,
    ) -> dict[str, np.ndarray]:
        """Returns what `collect` does, of this rank's share of `count` distinct rows; nothing if there is none for it."""
        adapters, vectors = trained
        gates = with_gates(self.base.model, adapters)
        for path, gate in gates.items():
            gate.vector.data.copy_(vectors[path])
        batches = distinct_batches(
            rows,
            count=count,
            micro_batch=ROWS_AT_ONCE,
            rank=rank,
            workers=workers,
            seed=seed,
        )
        parts = [self.collect([without_answer(row) for row in batch]) for batch in batches if batch]
        without_gates(self.base.model, gates)
        return {key: array.numpy() for key, array in _joined(parts).items()} if parts else {}
