"""The null expert: statistics of a small sample of general prompts, which belong to the base."""

from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy

from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from pipeline.models.prompts import collate_for, to_device
from pipeline.routing.evidence import EvidenceReader
from pipeline.routing.features import feature_width, project
from pipeline.routing.routed_model import PromptReader
from pipeline.routing.statistics import PromptStatistics
from pipeline.streams.packing import unpack
from pipeline.training.stages import heard_paths

FEATURES = "features"
"""Column of the prompt features; the others bear the path of the Linear whose pooled input they hold."""


def general_statistics(
    rows: ray.data.Dataset,
    base: BaseModelConfig,
    *,
    wanted_width: int | None,
    targets: str,
    gpu: bool = False,
    vision: bool = True,
) -> tuple[PromptStatistics, dict[str, PromptStatistics]]:
    """Returns the statistics of encoded prompts (without answers), at the language model's input and at its Linears.

    One pass without gradients; without `vision` the rows hold image features. `targets` is the regular expression of the
    Linears that experts adapt, or `auto`.
    """
    read = rows.map_batches(
        GeneralReader,
        fn_constructor_args=(base, wanted_width, targets, vision),
        batch_size=64,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=1),
        num_gpus=1 if gpu else None,
    )
    batches = list(read.iter_batches(batch_size=None, batch_format="numpy"))
    whole = {key: torch.from_numpy(np.concatenate([batch[key] for batch in batches])) for key in batches[0]}
    statistics = {key: PromptStatistics.of(samples) for key, samples in whole.items()}
    return statistics.pop(FEATURES), statistics


class GeneralReader:
    """Reads what routers need to know of encoded prompts."""

    def __init__(self, base: BaseModelConfig, wanted_width: int | None, targets: str, vision: bool) -> None:
        self.base = load_base(base, vision=vision)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base.model.to(self.device)
        self.width = feature_width(self.base.width, wanted_width)
        self.features: torch.Tensor | None = None
        self.evidence = EvidenceReader(self.base.model, heard_paths(self.base, targets))
        PromptReader(self.base.model, self._listen)

    def _listen(self, features: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        self.features, self.evidence.tokens_BT = features, tokens

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns `features` (B, F), and by path the pooled input of every Linear that hears something new (B, 64)."""
        inputs = to_device(collate_for(self.base.processor, unpack(batch), "left"), self.device)
        inputs.pop("labels")
        self.base.model(**inputs, use_cache=False)
        assert self.features is not None
        samples = {path: torch.cat(parts).numpy() for path, parts in self.evidence.samples.items()}
        self.evidence.samples.clear()
        return {FEATURES: project(self.features, self.width).cpu().numpy(), **samples}
