"""Reads rows of pieces, raw or encoded."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from pipeline.data.encoded.encoding import PART, POSITION, Encoder
from pipeline.data.errors import StreamError, UnreadableRow, first_line
from pipeline.data.loading import spool
from pipeline.data.loading.pieces import ReadRequest
from pipeline.data.sources.formats import of_network, row_values
from pipeline.data.sources.presets import wanted_columns
from pipeline.data.sources.raw_row import NUMBER, PATH, RAW, ROOT, packed_row

BLOCK_ROWS, BLOCK_BYTES = 64, 16 << 20
"""Raw rows that are handed on at a time: so many, or so many bytes."""


_CACHED_FILES = 16
_metadata: dict[tuple[str, str, int], pq.FileMetaData] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Origin:
    """Files of a part and how their rows are encoded."""

    encoder: Encoder
    filesystem: fs.FileSystem
    contents: Literal["own", "spooled", "encoded"]
    """What the files hold: the user's rows, copies of them (see `spool`), or encoded rows."""
    root: str = ""
    """Folder that image paths are relative to; empty: the file's folder."""


@dataclass(frozen=True)
class LoadedRow:
    """A requested row: where it is, or why it cannot be read."""

    request: ReadRequest
    i: int
    """Index among the rows of the request."""
    source: pa.Table | UnreadableRow
    """Table that holds it; or why it cannot be read."""
    at: int
    """Index in the table."""


def load(origins: Sequence[Origin], requests: Sequence[ReadRequest]) -> list[LoadedRow]:
    """Reads the rows of requests, in order; each file is opened once.

    Each row of a damaged row group is an UnreadableRow. Raises StreamError where storage fails.
    """
    by_file: dict[tuple[int, str], list[int]] = {}
    for number in sorted(range(len(requests)), key=lambda n: (requests[n].part, requests[n].path, requests[n].group)):
        by_file.setdefault((requests[number].part, requests[number].path), []).append(number)
    loaded: list[list[LoadedRow]] = [[]] * len(requests)
    for numbers in by_file.values():
        several = _of_file(origins[requests[numbers[0]].part], [requests[number] for number in numbers])
        for number, rows in zip(numbers, several, strict=True):
            loaded[number] = rows
    return [row for rows in loaded for row in rows]


def in_order(origins: Sequence[Origin], requests: Iterable[ReadRequest]) -> Iterator[dict[str, Any]]:
    """Yields the rows of requests in order, holding those of one request at a time; each file is opened once."""
    for (part, _), together in groupby(requests, key=lambda request: (request.part, request.path)):
        for rows in _of_file(origins[part], list(together)):
            yield from (raw_row(origins[part], row) for row in rows)


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    """Yields rows in small tables."""
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(batch) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield pa.Table.from_pylist(batch)
            batch, size = [], 0
    if batch:
        yield pa.Table.from_pylist(batch)


def _of_file(origin: Origin, requests: Sequence[ReadRequest]) -> Iterator[list[LoadedRow]]:
    """Yields the rows of each request of one file, in order."""
    wanted = wanted_columns(origin.encoder.part.source) if origin.contents == "own" else None
    try:
        opened = origin.filesystem.open_input_file(requests[0].path)
        file = _opened(origin, opened, requests[0].path)
    except (OSError, pa.ArrowException) as error:
        for request in requests:
            unreadable = _unreadable(origin, request, error)
            yield [LoadedRow(request, i, unreadable, 0) for i in range(len(request.at))]
        return
    names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
    blocks: list[tuple[int, pa.Table | UnreadableRow]] = []
    last: tuple[int, int] | None = None
    with opened:
        for request in requests:
            if last != (request.group, request.groups):
                blocks, last = _groups(origin, file, names or None, request), (request.group, request.groups)
            yield _select(blocks, request)


def _opened(origin: Origin, opened: pa.NativeFile, path: str) -> pq.ParquetFile:
    """Opens a parquet file; metadata are cached, since reading those of ten thousand row groups takes long."""
    key = (origin.filesystem.type_name, path, opened.size())
    with _lock:
        metadata = _metadata.get(key)
    file = pq.ParquetFile(opened, metadata=metadata, pre_buffer=True)
    if metadata is None:
        with _lock:
            if len(_metadata) >= _CACHED_FILES:
                _metadata.pop(next(iter(_metadata)))
            _metadata[key] = file.metadata
    return file


def _groups(
    origin: Origin, file: pq.ParquetFile, names: list[str] | None, request: ReadRequest
) -> list[tuple[int, pa.Table | UnreadableRow]]:
    """Returns the row groups of a request with their numbers of rows: as one table unless one of them is damaged."""
    groups = range(request.group, request.group + request.groups)
    try:
        table = file.read_row_groups(groups, columns=names)
        return [(len(table), table)]
    except (OSError, pa.ArrowException) as error:
        if len(groups) == 1:
            return [(file.metadata.row_group(request.group).num_rows, _unreadable(origin, request, error))]
    return [
        block for group in groups for block in _groups(origin, file, names, replace(request, group=group, groups=1))
    ]


def _select(blocks: list[tuple[int, pa.Table | UnreadableRow]], request: ReadRequest) -> list[LoadedRow]:
    """Returns the rows of a request, without a reference to the rows around them."""
    rows: list[LoadedRow] = []
    begin = 0
    for count, source in blocks:
        indices = request.at[(request.at >= begin) & (request.at < begin + count)] - begin
        if isinstance(source, UnreadableRow):
            rows += [LoadedRow(request, len(rows) + i, source, 0) for i in range(len(indices))]
        else:
            table = source if len(indices) == count else source.take(indices)
            rows += [LoadedRow(request, len(rows) + i, table, i) for i in range(len(indices))]
        begin += count
    return rows


def _unreadable(origin: Origin, request: ReadRequest, error: Exception) -> UnreadableRow:
    last = request.group + request.groups - 1
    groups = f"row group {request.group}" if last == request.group else f"row groups {request.group} to {last}"
    reason = f"{groups} of {PurePosixPath(request.path).name} cannot be read: {first_line(error)}"
    if origin.contents == "encoded" or of_network(origin.filesystem, error):
        raise StreamError(f"{request.path}: {reason}") from None
    return UnreadableRow(reason, lost=groups)


def raw_row(origin: Origin, row: LoadedRow) -> dict[str, Any]:
    """Returns a row as its part stores it: raw or encoded."""
    request, source, at = row.request, row.source, int(row.request.at[row.i])
    mark = {PART: request.part, POSITION: request.offset + at}
    if not isinstance(source, UnreadableRow) and origin.contents != "own":
        values = {name: c[row.at].as_py() for name, c in zip(source.column_names, source.columns, strict=True)}
        if origin.contents == "spooled":
            values[RAW] = packed_row(spool.content(values[RAW], values.pop(spool.BLOBS)))
        return values | mark
    content = source if isinstance(source, UnreadableRow) else row_values(source, row.at)
    return {PATH: request.path, NUMBER: request.number + at, ROOT: origin.root, RAW: packed_row(content)} | mark
