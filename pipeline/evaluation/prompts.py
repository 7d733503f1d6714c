"""Tables of a task's prompts: each prompt is read, encoded and passed through the base once.

A table has a row for every row of a source, good or bad, in the order of its files: file and number, question, reference,
digest of the encoded prompt, and prompt features in the width of the pools' routers (12 to 24 times smaller than unprojected
ones; each width has its own table). Routing and scoring read tables; rows are encoded again only to be answered.

Shapes: N good rows, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import DataConfig, TaskConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.loading.prompts import Numbers
from pipeline.data.rows.quarantine import NOTES, SetAside, set_aside
from pipeline.data.sources.raw_row import NUMBER
from pipeline.errors import stored_file
from pipeline.evaluation.pages import paged
from pipeline.evaluation.tables import write_table

REMEDY = "delete this file, and it is made anew"
"""Remedy for a damaged table."""

KEPT_COLUMNS = ("source", NUMBER, "id", "question", "reference", "prompt", "reason", "excerpt", "rows", "lost")
"""Columns that a table takes from encoded rows; `features` is added."""


@dataclass(frozen=True)
class EvalTask:
    """A task or benchmark with the source of its prompts."""

    config: TaskConfig
    part: TaskRows

    @property
    def name(self) -> str:
        """Name of the task or benchmark."""
        return self.config.name


@dataclass(frozen=True, eq=False)
class PromptTable:
    """The prompts of one task or benchmark."""

    table: pa.Table

    @cached_property
    def good(self) -> np.ndarray:
        """Numbers of the good rows among all (N,)."""
        return np.flatnonzero(self._values("reason") == "")

    @property
    def files(self) -> set[str]:
        """The files that the prompts were read from."""
        return set(pa.compute.unique(self.table["source"]).to_pylist())

    @cached_property
    def prompts(self) -> np.ndarray:
        """Digests of the good rows' prompts (N,)."""
        return self._values("prompt")[self.good]

    @property
    def features_NF(self) -> torch.Tensor:
        """Prompt features of the good rows, float32."""
        flat = self.table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.reshape(len(self.table), -1)[self.good])

    def rows(self, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Returns the values of these columns, row by row, of the good rows."""
        return list(zip(*(self._values(name)[self.good].tolist() for name in names), strict=True))

    def pages(self, size: int) -> list[tuple[int, ...]]:
        """Returns the pages of the good rows, as indices among them."""
        return paged(range(len(self.good)), size)

    def reading(self, indices: Sequence[int]) -> tuple[Numbers, dict[int, int]]:
        """Returns how to read good rows again: numbers by file, and by index the position among the rows that arrive."""
        sources, numbers = self._values("source"), self._values(NUMBER)
        numbers_by_file: dict[str, set[int]] = {}
        for row in self.good[list(indices)]:
            numbers_by_file.setdefault(sources[row], set()).add(int(numbers[row]))
        index_of = {int(row): index for index, row in enumerate(self.good)}
        come = [row for row in range(len(self.table)) if numbers[row] in numbers_by_file.get(sources[row], ())]
        arrival = {index_of[row]: at for at, row in enumerate(come) if row in index_of}
        return {file: sorted(of_file) for file, of_file in numbers_by_file.items()}, arrival

    def set_aside(self, task: EvalTask, file: Path, data: DataConfig) -> SetAside:
        """Writes bad rows to the quarantine `file`; raises StreamError where there are too many (see `quarantine`)."""
        bad = self.table.filter(pa.compute.not_equal(self.table["reason"], "")).select(list(NOTES)).to_pylist()
        return set_aside(task.name, task.part.source, bad, len(self.good), file, data)

    def save(self, file: Path) -> None:
        """Writes the table atomically."""
        write_table(self.table, file)

    @classmethod
    def load(cls, file: Path) -> "PromptTable":
        """Reads what `save` wrote; raises StoredFileError where it is damaged."""
        with stored_file(file, REMEDY):
            return cls(pq.read_table(file).select([*KEPT_COLUMNS, "features"]))

    def _values(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


def kept_columns(encoded: pa.Table, features_NF: np.ndarray) -> pa.Table:
    """Returns a table's columns of encoded rows and their features."""
    flat = pa.array(np.ascontiguousarray(features_NF, np.float32).ravel())
    kept = encoded.select(list(KEPT_COLUMNS))
    return kept.append_column("features", pa.FixedSizeListArray.from_arrays(flat, features_NF.shape[1]))
