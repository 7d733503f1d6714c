"""Prompts of a part, all or some, encoded when they are read.

Rows are identified by file and number. A caller that has read all rows once can request some of them again; only these are
decoded and encoded, from the user's files or from cached image embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import ray
from ray.data.expressions import col

from pipeline.config import BaseModelConfig, DataConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.encoded.image_embeds import DONE, with_image_embeds
from pipeline.data.loading.preprocess import encoded_rows
from pipeline.data.sources.raw_row import NUMBER, PATH
from pipeline.models.inference import InferenceWorkers
from pipeline.storage.mirror import Folder, Mirror, made_at

Numbers = Mapping[str, Sequence[int]]
"""Some rows of a source: numbers by file. Rows that share a number (rotations of a question) come together."""


@dataclass(frozen=True)
class PromptSource:
    """Reads the prompts of parts for one base, in the order of the files."""

    base: BaseModelConfig
    data: DataConfig
    data_folder: Folder
    """Folder of the demo's files."""
    embeds_folder: Folder
    """Folder of cached image embeddings, by part."""
    workers: InferenceWorkers
    """Workers that compute image embeddings."""

    def rows(self, name: str, part: TaskRows, numbers: Numbers | None = None) -> ray.data.Dataset:
        """Returns the encoded rows of part `name`, or those of `numbers`, lazily; bad ones have a `reason`.

        With `data.vision_cache` the rows hold image embeddings; callers that hold GPUs call `compute_image_embeds` first.
        """
        if self.data.vision_cache == "off":
            return self._encoded(name, part, None if numbers is None else _chosen(numbers, PATH))
        self.compute_image_embeds(name, part)
        place = made_at(self._folder(name, part), DONE)
        assert place is not None, "computed now or before"
        kept = ray.data.read_parquet(place[1], filesystem=place[0])
        return kept if numbers is None else kept.filter(expr=_chosen(numbers, "source"))

    def has_image_embeds(self, name: str, part: TaskRows) -> bool:
        """Whether the image embeddings of a part are cached, or need no cache."""
        return self.data.vision_cache == "off" or made_at(self._folder(name, part), DONE) is not None

    def compute_image_embeds(self, name: str, part: TaskRows) -> None:
        """Computes and caches the image embeddings of a part, unless they are cached."""
        if not self.has_image_embeds(name, part):
            with_image_embeds(
                self._encoded(name, part, None), self.base, self._folder(name, part), workers=self.workers
            )

    def _folder(self, name: str, part: TaskRows) -> Mirror:
        return Mirror.of(self.embeds_folder) / f"{name}-{part.key}"

    def _encoded(self, name: str, part: TaskRows, chosen: Any) -> ray.data.Dataset:
        data, folder = self.data, self.data_folder
        return encoded_rows(part, name, data, base=self.base, data_folder=folder, answer=False, chosen=chosen)


def _chosen(numbers: Numbers, path: str) -> Any:
    """Returns the expression that selects the rows of `numbers`; column `path` holds their file."""
    files = [(col(path) == file) & col(NUMBER).is_in(sorted(set(of_file))) for file, of_file in numbers.items()]
    return reduce(or_, files)
