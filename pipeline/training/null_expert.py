"""The null expert: statistics of a small sample of base prompts, which belong to the base."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from pipeline.config import BaseModelConfig
from pipeline.data.encoded.actors import on_workers
from pipeline.data.encoded.packing import unpack
from pipeline.models.encoding import Encoded, ids
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.models.target_modules import observed_paths
from pipeline.routing.features import feature_width, project_prompts
from pipeline.routing.layer_classifiers import LayerInputHook
from pipeline.routing.null import components
from pipeline.routing.prompt_hooks import PromptFeatureHook
from pipeline.routing.statistics import PromptStatistics

FEATURES, IDS = "features", "ids"
"""Columns of prompt features and ids; the others bear the path of the Linear whose pooled input they hold."""


def null_statistics(
    rows: ray.data.Dataset,
    base: BaseModelConfig,
    *,
    wanted_width: int | None,
    null_components: int,
    targets: str,
    workers: InferenceWorkers,
    vision: bool = True,
) -> tuple[tuple[PromptStatistics, ...], dict[str, PromptStatistics]]:
    """Returns the components of encoded prompts (without answers), and their statistics as the Linears see them.

    One pass without gradients; without `vision` the rows hold image features. `targets` is the regular expression of the
    Linears that experts adapt, or `auto`.
    """
    read = on_workers(
        rows,
        StatisticsCollector,
        base,
        wanted_width,
        targets,
        vision,
        workers=workers,
        rows_at_once=workers.batch_size,
    )
    batches = list(read.iter_batches(batch_size=None, batch_format="numpy"))
    samples_by_name = {key: torch.from_numpy(np.concatenate([batch[key] for batch in batches])) for key in batches[0]}
    null = components(samples_by_name.pop(FEATURES), null_components, samples_by_name.pop(IDS))
    return null, {key: PromptStatistics.of(samples) for key, samples in samples_by_name.items()}


class StatisticsCollector(FrozenBase):
    """Reads what routers need to know of encoded prompts."""

    def __init__(
        self, base: BaseModelConfig, workers: InferenceWorkers, wanted_width: int | None, targets: str, vision: bool
    ) -> None:
        super().__init__(base, workers, vision=vision)
        self.width = feature_width(self.base.width, wanted_width)
        self.features: torch.Tensor | None = None
        self.layer_inputs = LayerInputHook(self.base.model, observed_paths(self.base, targets))
        PromptFeatureHook(self.base.model, self._on_features)

    def _on_features(self, features: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        self.features, self.layer_inputs.tokens_BT = features, tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns `features` (B, F), `ids` (B, 2), and the pooled input of every observed Linear by path (B, 64)."""
        return self.collect(unpack(batch))

    def collect(self, prompts: Sequence[Encoded]) -> dict[str, np.ndarray]:
        """Returns the same of prompts that are no columns any more."""
        order, parts = [], []
        for members, rows in self.batches(prompts):
            self.read(rows)
            assert self.features is not None
            features_BF = project_prompts(self.features, self.width).cpu()
            parts.append(
                {FEATURES: features_BF, IDS: ids(rows)}
                | {p: torch.cat(s) for p, s in self.layer_inputs.samples.items()}
            )
            self.layer_inputs.samples.clear()
            order += members
        back = torch.tensor(order).argsort()
        return {key: torch.cat([part[key] for part in parts])[back].numpy() for key in parts[0]}
