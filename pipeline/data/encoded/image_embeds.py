"""Image embeddings of the frozen vision tower, computed once and kept on disk.

The tower never changes, so epochs, stages, methods and evaluations read the same embeddings instead of running it again,
and training workers need not load the tower. Stored as parquet beside the run's data, under a name derived from rows and
base.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.fs as fs
import ray
import torch

from pipeline.config import BaseModelConfig
from pipeline.data.encoded.actors import on_workers
from pipeline.data.encoded.packing import pack, unpack
from pipeline.data.errors import StreamError
from pipeline.models.encoding import IMAGE_EMBEDS, Encoded, image_hash
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.storage.mirror import Folder, made_by_all

DONE = "_SUCCESS"
"""Marks a complete folder."""

ROWS_AT_ONCE = 16
"""Rows per batch of a worker; the tower runs on one row at a time."""


def with_image_embeds(
    rows: ray.data.Dataset, base: BaseModelConfig, folder: Folder, *, workers: InferenceWorkers
) -> ray.data.Dataset:
    """Returns encoded rows with image embeddings instead of pixels, read from `folder` or computed and written there."""

    def write(filesystem: fs.FileSystem, unfinished: str) -> None:
        with_embeds = on_workers(rows, ImageEncoder, base, workers=workers, rows_at_once=ROWS_AT_ONCE)
        with_embeds.write_parquet(unfinished, filesystem=filesystem)

    filesystem, path = made_by_all(folder, write, why="which computes the same image embeddings", mark=DONE)
    return ray.data.read_parquet(path, filesystem=filesystem)


class ImageEncoder(FrozenBase):
    """Replaces pixels of encoded rows by image embeddings, in the precision of the base."""

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
        """Returns the row with embeddings (image tokens, D); one row at a time, so they do not depend on the batch."""
        if "pixel_values" not in row.images:
            return row
        embeds_ND = self.image_embeds(row)
        if embeds_ND.dtype == torch.bfloat16:
            embeds_ND = embeds_ND.view(torch.uint16)
        kept = {name: array for name, array in row.images.items() if name.endswith("grid_thw")}
        return replace(row, images={IMAGE_EMBEDS: embeds_ND.cpu().numpy(), **kept}, image_id=image_hash(row))
