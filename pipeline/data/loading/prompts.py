"""Rows that are asked, not learned: all of a part, or some of them, encoded when they are read.

Rows are known by file and number: whoever has seen all of them once names those that are needed again, and only these are
decoded and encoded, from the user's files or from what is kept of the vision tower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import ray
from ray.data.expressions import col

from pipeline.config import BaseModelConfig, DataConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.encoded.image_embeds import DONE, with_features
from pipeline.data.loading.preprocess import encoded_rows
from pipeline.data.sources.reader import NUMBER, PATH
from pipeline.models.inference import InferenceWorkers

Numbers = Mapping[str, Sequence[int]]
"""Some rows of a source: numbers by file. Rows that share a number (rotations of a question) come together."""


@dataclass(frozen=True)
class PromptSource:
    """Reads the prompts of parts for one base, in the order of the files."""

    base: BaseModelConfig
    data: DataConfig
    data_folder: Path
    """Where rows that ship with the project are."""
    features: Path
    """Where image features are kept, by part."""
    workers: InferenceWorkers
    """Who computes image features."""

    def rows(self, name: str, part: TaskRows, numbers: Numbers | None = None) -> ray.data.Dataset:
        """Returns the encoded rows of part `name`, or those of `numbers`, lazily; bad ones have a `reason`.

        With `data.vision_cache` the rows hold image features; whoever holds GPUs calls `see` first.
        """
        if self.data.vision_cache == "off":
            return self._encoded(name, part, None if numbers is None else _chosen(numbers, PATH))
        self.see(name, part)
        kept = ray.data.read_parquet(str(self._folder(name, part)))
        return kept if numbers is None else kept.filter(expr=_chosen(numbers, "source"))

    def has_seen(self, name: str, part: TaskRows) -> bool:
        """Whether nothing is left to compute before the rows of a part can be read."""
        return self.data.vision_cache == "off" or (self._folder(name, part) / DONE).exists()

    def see(self, name: str, part: TaskRows) -> None:
        """Computes the image features of a part that are to be kept and are not there yet."""
        if not self.has_seen(name, part):
            with_features(self._encoded(name, part, None), self.base, self._folder(name, part), workers=self.workers)

    def _folder(self, name: str, part: TaskRows) -> Path:
        return self.features / f"{name}-{part.key}"

    def _encoded(self, name: str, part: TaskRows, chosen: Any) -> ray.data.Dataset:
        data, folder = self.data, self.data_folder
        return encoded_rows(part, name, data, base=self.base, data_folder=folder, answer=False, chosen=chosen)


def _chosen(numbers: Numbers, path: str) -> Any:
    """Returns the expression that is true of the rows of `numbers`, whose file stands in column `path`."""
    files = [(col(path) == file) & col(NUMBER).is_in(sorted(set(of_file))) for file, of_file in numbers.items()]
    return reduce(or_, files)
