"""A raw row: a row of the user's as it travels from the reader to the encoder, the same for all formats of files."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from pipeline.config import SourceConfig
from pipeline.data.demo.files import SCHEME
from pipeline.data.errors import SHOWN, BadRow, UnreadableRow, printable
from pipeline.data.rows.conversations import text_of
from pipeline.data.rows.images import MAX_PIXELS
from pipeline.data.rows.records import Record, identity, to_record
from pipeline.data.sources.files import split_glob
from pipeline.data.sources.formats import Row
from pipeline.data.sources.presets import columns_of
from pipeline.data.sources.storage import ImageFolder, locate

PATH, NUMBER, ROOT, RAW = "path", "number", "root", "raw"
"""Columns of a table of raw rows: file, number in it, folder of the image paths (empty: the file's), content (pickled)."""


def packed_row(content: Row) -> bytes:
    """Serializes the content of a raw row."""
    try:
        return pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    except RecursionError:
        return pickle.dumps(UnreadableRow("nested too deeply"), pickle.HIGHEST_PROTOCOL)


@dataclass(frozen=True)
class RawRow:
    """A row of a table of raw rows, deserialized once."""

    path: str
    number: int
    root: str
    content: Row

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "RawRow":
        """Reads the columns of a raw row."""
        return cls(row[PATH], row[NUMBER], row[ROOT], pickle.loads(row[RAW]))

    def id(self, source: SourceConfig) -> str:
        """Returns the row's id, good or bad; without an id, its file and number."""
        given = (
            "" if isinstance(self.content, UnreadableRow) else identity(self.content, columns_of(source, self.content))
        )
        return given or f"{PurePosixPath(self.path).name}#{self.number}"

    def record(
        self, source: SourceConfig, prompt: str, *, max_pixels: int = MAX_PIXELS, answered: bool = True
    ) -> Record:
        """Turns the row into a record, without `answered` one that needs no answer; raises BadRow."""
        if isinstance(self.content, UnreadableRow):
            raise BadRow(self.content.reason)
        columns = columns_of(source, self.content)
        if source.preset is not None and self.content.get(columns.images) is None:
            raise BadRow(
                f"column {columns.images!r} is missing or null; every row of preset {source.preset} has an image"
            )
        if self.root:
            folder = _folder(self.root)
        else:
            where = "/" if source.path.startswith(SCHEME) else split_glob(source.path)[0]
            folder = ImageFolder(_folder(where).filesystem, str(PurePosixPath(self.path).parent))
        return to_record(
            self.content,
            columns,
            name=self.id(source),
            prompt=prompt,
            folder=folder,
            max_pixels=max_pixels,
            answered=answered,
        )

    def task(self, column: str) -> str:
        """Returns the name of the row's task, which is in `column`; raises BadRow where it has none."""
        assert not isinstance(self.content, UnreadableRow), "`record` has refused it"
        name = text_of(self.content.get(column), f"column {column!r}")
        if not name:
            raise BadRow(f"column {column!r}, which names the task, is missing or empty")
        return name

    @property
    def excerpt(self) -> str:
        """The beginning of the content as text, for the quarantine file."""
        if isinstance(self.content, UnreadableRow):
            return self.content.excerpt
        return printable(json.dumps(_shortened(self.content), ensure_ascii=False, default=str))

    @property
    def extent(self) -> dict[str, Any]:
        """How many `rows` it stands for, and what of its file is `lost`; see UnreadableRow."""
        if isinstance(self.content, UnreadableRow):
            return {"rows": self.content.rows, "lost": self.content.lost}
        return {"rows": 1, "lost": ""}


@lru_cache(maxsize=64)
def _folder(path: str) -> ImageFolder:
    """Opens a folder once; with some storage that is a round trip."""
    return ImageFolder(*locate(path))


def _shortened(value: Any, depth: int = 4) -> Any:
    """Returns a value shortened to what the quarantine file shows."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str):
        return value[:SHOWN]
    if isinstance(value, (list, tuple)):
        return [_shortened(item, depth - 1) for item in value[:SHOWN]] if depth else "..."
    if isinstance(value, Mapping):
        return {str(key)[:SHOWN]: _shortened(item, depth - 1) for key, item in value.items()} if depth else "..."
    return value
