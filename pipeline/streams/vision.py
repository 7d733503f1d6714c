"""What the frozen vision tower says of the images, computed once and kept on disk.

The tower does not change, so neither does its answer: epochs, stages, methods and evaluations read the same features
instead of running it again, and the tower need not even be in the memory of those who train. Kept as parquet beside the
run's data, under a name derived from rows and base.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy

from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from pipeline.models.prompts import FEATURES, Encoded, collate_for, to_device
from pipeline.streams.packing import pack, unpack
from pipeline.streams.sources import StreamError

DONE = "_SUCCESS"
"""Marks a folder of features that is complete."""

IMAGES_AT_ONCE = 16
"""Rows whose images pass through the tower together."""


def with_features(rows: ray.data.Dataset, base: BaseModelConfig, folder: Path, *, gpus: int = 0) -> ray.data.Dataset:
    """Returns encoded rows with image features instead of pixels, from `folder` or computed now and written there.

    On `gpus` GPUs at a time, or on the CPU.
    """
    if not (folder / DONE).exists():
        draft = folder.with_name(folder.name + ".draft")
        shutil.rmtree(draft, ignore_errors=True)
        seen = rows.map_batches(
            VisionReader,
            fn_constructor_args=(base,),
            batch_size=IMAGES_AT_ONCE,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=max(1, gpus)),
            num_gpus=1 if gpus else None,
        )
        seen.write_parquet(str(draft))
        (draft / DONE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    return ray.data.read_parquet(str(folder))


class VisionReader:
    """Holds a base and turns the pixels of encoded rows into image features, in the precision of the base."""

    def __init__(self, base: BaseModelConfig) -> None:
        self.base = load_base(base)
        if not self.base.family.features:
            raise StreamError(
                f"data.vision_cache=features: {base.path} feeds inner layers of its vision tower into the language model, "
                "so its features cannot be kept; set data.vision_cache=off"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base.model.to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Replaces the image arrays of a batch of packed rows."""
        rows = [self._seen(row) for row in unpack(batch)]
        packed = [pack(row) for row in rows]
        return batch | {name: np.array([row[name] for row in packed], object) for name in packed[0]}

    @torch.inference_mode()
    def _seen(self, row: Encoded) -> Encoded:
        """Returns the row with features (image tokens, D); one row at a time, so that it does not depend on its batch."""
        if "pixel_values" not in row.images:
            return row
        batch = collate_for(self.base.processor, [row])
        arrays = {name: to_device(batch[name], self.device) for name in row.images}
        found = self.base.model.base_model.get_image_features(**arrays, return_dict=True).pooler_output
        features_ND = torch.cat([part.flatten(0, -2) for part in found])
        if features_ND.dtype == torch.bfloat16:
            features_ND = features_ND.view(torch.uint16)
        kept = {name: array for name, array in row.images.items() if name.endswith("grid_thw")}
        return Encoded(row.input_ids, row.labels, {FEATURES: features_ND.cpu().numpy(), **kept}, row.marks)
