"""Copies raw rows into parquet, where their own files cannot be read from the middle.

These are all text files (jsonl, json, csv, tsv, compressed or not), parquet with large row groups, and MMBench's rotations.
A row is stored as JSON beside its bytes, so reading it back runs no code.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs

from pipeline.config import SourceConfig
from pipeline.data.errors import UnreadableRow
from pipeline.data.sources.formats import Row
from pipeline.data.sources.raw_row import NUMBER, PATH, RAW, ROOT, RawRow
from pipeline.data.sources.reader import read
from pipeline.storage.mirror import Folder, made_by_all

DONE = "_SUCCESS"
"""Marks a complete folder."""

BLOBS = "blobs"
"""Column of a row's bytes."""

_BYTES, _UNREADABLE = "$bytes", "$fault"
_SCHEMA = pa.schema([
    (PATH, pa.string()), (NUMBER, pa.int64()), (ROOT, pa.string()), (RAW, pa.string()), (BLOBS, pa.list_(pa.binary())),
])  # fmt: skip


def spooled(source: SourceConfig, data_folder: Folder, folder: Folder, *, readers: int) -> tuple[fs.FileSystem, str]:
    """Copies the raw rows of a source into `folder`, unless they are there; returns where the files are."""

    def write(filesystem: fs.FileSystem, unfinished: str) -> None:
        rows = read(source, data_folder, readers=readers).map_batches(_written, batch_format="pyarrow", batch_size=None)
        rows.write_parquet(unfinished, filesystem=filesystem)

    return made_by_all(folder, write, why="which copies the same rows", mark=DONE)


def _written(batch: pa.Table) -> pa.Table:
    rows = []
    for raw in batch.to_pylist():
        blobs: list[bytes] = []
        rows.append(raw | {RAW: _text(RawRow.of(raw).content, blobs), BLOBS: blobs})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _text(content: Row, blobs: list[bytes]) -> str:
    def beside(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray, memoryview)):
            blobs.append(bytes(value))
            return {_BYTES: len(blobs) - 1}
        return str(value)

    document = (
        {_UNREADABLE: [content.reason, content.excerpt, content.lost, content.rows]}
        if isinstance(content, UnreadableRow)
        else content
    )
    return json.dumps(document, default=beside)


def content(text: str, blobs: Sequence[bytes]) -> Row:
    """Restores a copied row."""

    def back(value: dict[str, Any]) -> Any:
        return blobs[value[_BYTES]] if value.keys() == {_BYTES} else value

    document: Mapping[str, Any] = json.loads(text, object_hook=back)
    return UnreadableRow(*document[_UNREADABLE]) if document.keys() == {_UNREADABLE} else dict(document)
