"""The null expert: statistics of a small sample of general prompts, which belong to the base."""

from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy

from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from pipeline.models.prompts import collate
from pipeline.routing.features import feature_width, project
from pipeline.routing.routed_model import PromptReader
from pipeline.routing.statistics import PromptStatistics
from pipeline.streams.preprocess import unpack


def general_statistics(
    rows: ray.data.Dataset, base: BaseModelConfig, *, wanted_width: int | None, gpu: bool = False
) -> PromptStatistics:
    """Returns the statistics of encoded prompts (without answers); one pass without gradients."""
    read = rows.map_batches(
        FeatureReader,
        fn_constructor_args=(base, wanted_width),
        batch_size=64,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=1),
        num_gpus=1 if gpu else None,
    )
    features_NF = np.stack([row["features"] for row in read.iter_rows()])
    return PromptStatistics.of(torch.from_numpy(features_NF))


class FeatureReader:
    """Reads the prompt features of encoded rows."""

    def __init__(self, base: BaseModelConfig, wanted_width: int | None) -> None:
        self.base = load_base(base)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base.model.to(self.device)
        self.width = feature_width(self.base.width, wanted_width)
        self.features: torch.Tensor | None = None
        PromptReader(self.base.model, self._listen)

    def _listen(self, features: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        self.features = features

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Returns `features` (B, F)."""
        inputs = collate(unpack(batch), pad_token_id=self.base.processor.tokenizer.pad_token_id, side="left")
        inputs.pop("labels")
        self.base.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}, use_cache=False)
        assert self.features is not None
        return {"features": project(self.features, self.width).cpu().numpy()}
