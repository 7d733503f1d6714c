"""What the frozen vision tower says of the images, computed once and kept on disk.

The tower does not change, so neither does its answer: epochs, stages, methods and evaluations read the same features
instead of running it again, and the tower need not even be in the memory of those who train. Kept as parquet beside the
run's data, under a name derived from rows and base.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from pipeline.config import BaseModelConfig
from pipeline.data.encoded.actors import on_workers
from pipeline.data.encoded.packing import pack, unpack
from pipeline.data.sources.reader import StreamError
from pipeline.locks import made_once
from pipeline.models.encoding import FEATURES, Encoded, image_hash
from pipeline.models.inference import FrozenBase, InferenceWorkers

DONE = "_SUCCESS"
"""Marks a folder of features that is complete."""

ROWS_AT_ONCE = 16
"""Rows that a worker takes at a time; their images pass through the tower row by row."""


def with_features(
    rows: ray.data.Dataset, base: BaseModelConfig, folder: Path, *, workers: InferenceWorkers
) -> ray.data.Dataset:
    """Returns encoded rows with image features instead of pixels, from `folder` or computed now and written there."""

    def write(unfinished: Path) -> None:
        seen = on_workers(rows, ImageEncoder, base, workers=workers, rows_at_once=ROWS_AT_ONCE)
        seen.write_parquet(str(unfinished))

    made_once(folder, write, why="which computes the same image features", mark=DONE)
    return ray.data.read_parquet(str(folder))


class ImageEncoder(FrozenBase):
    """Turns the pixels of encoded rows into image features, in the precision of the base."""

    def __init__(self, base: BaseModelConfig, workers: InferenceWorkers) -> None:
        super().__init__(base, workers)
        if not self.base.family.supports_image_cache:
            raise StreamError(
                f"data.vision_cache=features: {base.path} feeds inner layers of its vision tower into the language model, "
                "so its features cannot be kept; set data.vision_cache=off"
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Replaces the image arrays of a batch of packed rows."""
        packed = [pack(self._encoded(row)) for row in unpack(batch)]
        return batch | {name: np.array([row[name] for row in packed], object) for name in packed[0]}

    def _encoded(self, row: Encoded) -> Encoded:
        """Returns the row with features (image tokens, D); one row at a time, so that it does not depend on its batch."""
        if "pixel_values" not in row.images:
            return row
        features_ND = self.image_features(row)
        if features_ND.dtype == torch.bfloat16:
            features_ND = features_ND.view(torch.uint16)
        kept = {name: array for name, array in row.images.items() if name.endswith("grid_thw")}
        return replace(row, images={FEATURES: features_ND.cpu().numpy(), **kept}, image_id=image_hash(row))
