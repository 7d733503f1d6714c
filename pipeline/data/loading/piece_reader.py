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

from pipeline.data.encoded.encoding import PLACE, WHICH, Encoder
from pipeline.data.errors import StreamError, UnreadableRow, first_line
from pipeline.data.loading import spool
from pipeline.data.loading.pieces import Read
from pipeline.data.sources.formats import of_network, row_values
from pipeline.data.sources.presets import wanted_columns
from pipeline.data.sources.reader import NUMBER, PATH, RAW, ROOT, packed_row

BLOCK_ROWS, BLOCK_BYTES = 64, 16 << 20
"""Raw rows that are handed on at a time: so many, or so many bytes."""


_FILES_KNOWN = 16
_known: dict[tuple[str, str, int], pq.FileMetaData] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Origin:
    """What the files of a part hold, and how it becomes encoded rows."""

    encoder: Encoder
    filesystem: fs.FileSystem
    kind: Literal["own", "spooled", "encoded"]
    """What the files hold: the user's rows, copies of them (see `spool`), or encoded rows."""
    root: str = ""
    """What the image paths of the user's rows count from; empty: their file's folder."""


@dataclass(frozen=True)
class Found:
    """A row that was looked for."""

    read: Read
    i: int
    """Its place among the rows of the read."""
    source: pa.Table | UnreadableRow
    """Where it is; or why it cannot be read."""
    at: int
    """At which place."""


def load(origins: Sequence[Origin], reads: Sequence[Read]) -> list[Found]:
    """Reads rows, those of each read in turn; each file is opened once.

    A row group that is damaged is a UnreadableRow in the place of each of its rows. Raises StreamError where storage fails.
    """
    by_file: dict[tuple[int, str], list[int]] = {}
    for number in sorted(range(len(reads)), key=lambda n: (reads[n].part, reads[n].path, reads[n].group)):
        by_file.setdefault((reads[number].part, reads[number].path), []).append(number)
    found: list[list[Found]] = [[]] * len(reads)
    for numbers in by_file.values():
        several = _of_file(origins[reads[numbers[0]].part], [reads[number] for number in numbers])
        for number, rows in zip(numbers, several, strict=True):
            found[number] = rows
    return [row for rows in found for row in rows]


def in_order(origins: Sequence[Origin], reads: Iterable[Read]) -> Iterator[dict[str, Any]]:
    """Yields the rows of reads in turn, and holds no more than those of one; each file is opened once."""
    for (part, _), together in groupby(reads, key=lambda read: (read.part, read.path)):
        for rows in _of_file(origins[part], list(together)):
            yield from (raw_row(origins[part], row) for row in rows)


def tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    """Yields rows in small tables."""
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(held) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield pa.Table.from_pylist(held)
            held, size = [], 0
    if held:
        yield pa.Table.from_pylist(held)


def _of_file(origin: Origin, reads: Sequence[Read]) -> Iterator[list[Found]]:
    """Yields the rows of reads of one file, in their order."""
    known = wanted_columns(origin.encoder.part.source) if origin.kind == "own" else None
    try:
        stream = origin.filesystem.open_input_file(reads[0].path)
        file = _opened(origin, stream, reads[0].path)
    except (OSError, pa.ArrowException) as error:
        for read in reads:
            fault = _fault(origin, read, error)
            yield [Found(read, i, fault, 0) for i in range(len(read.at))]
        return
    names = [name for name in file.schema_arrow.names if known is None or name in known]
    held: list[tuple[int, pa.Table | UnreadableRow]] = []
    last: tuple[int, int] | None = None
    with stream:
        for read in reads:
            if last != (read.group, read.groups):
                held, last = _groups(origin, file, names or None, read), (read.group, read.groups)
            yield _taken(held, read)


def _opened(origin: Origin, stream: pa.NativeFile, path: str) -> pq.ParquetFile:
    """Opens a parquet file; what some files hold is remembered, since of ten thousand row groups it takes long to read."""
    key = (origin.filesystem.type_name, path, stream.size())
    with _lock:
        known = _known.get(key)
    file = pq.ParquetFile(stream, metadata=known, pre_buffer=True)
    if known is None:
        with _lock:
            if len(_known) >= _FILES_KNOWN:
                _known.pop(next(iter(_known)))
            _known[key] = file.metadata
    return file


def _groups(
    origin: Origin, file: pq.ParquetFile, names: list[str] | None, read: Read
) -> list[tuple[int, pa.Table | UnreadableRow]]:
    """Returns the row groups of a read, as one table unless one of them is damaged, each with how many rows it stands for."""
    groups = range(read.group, read.group + read.groups)
    try:
        table = file.read_row_groups(groups, columns=names)
        return [(len(table), table)]
    except (OSError, pa.ArrowException) as error:
        if len(groups) == 1:
            return [(file.metadata.row_group(read.group).num_rows, _fault(origin, read, error))]
    return [found for group in groups for found in _groups(origin, file, names, replace(read, group=group, groups=1))]


def _taken(held: list[tuple[int, pa.Table | UnreadableRow]], read: Read) -> list[Found]:
    """Returns the rows of a read, without holding on to those around them."""
    rows: list[Found] = []
    begin = 0
    for count, source in held:
        own = read.at[(read.at >= begin) & (read.at < begin + count)] - begin
        if isinstance(source, UnreadableRow):
            rows += [Found(read, len(rows) + i, source, 0) for i in range(len(own))]
        else:
            taken = source if len(own) == count else source.take(own)
            rows += [Found(read, len(rows) + i, taken, i) for i in range(len(own))]
        begin += count
    return rows


def _fault(origin: Origin, read: Read, error: Exception) -> UnreadableRow:
    last = read.group + read.groups - 1
    groups = f"row group {read.group}" if last == read.group else f"row groups {read.group} to {last}"
    reason = f"{groups} of {PurePosixPath(read.path).name} cannot be read: {first_line(error)}"
    if origin.kind == "encoded" or of_network(origin.filesystem, error):
        raise StreamError(f"{read.path}: {reason}") from None
    return UnreadableRow(reason, lost=groups)


def raw_row(origin: Origin, found: Found) -> dict[str, Any]:
    """Returns a row as this kind of part has it: raw or encoded."""
    read, source, at = found.read, found.source, int(found.read.at[found.i])
    mark = {WHICH: read.part, PLACE: read.place + at}
    if not isinstance(source, UnreadableRow) and origin.kind != "own":
        row = {name: c[found.at].as_py() for name, c in zip(source.column_names, source.columns, strict=True)}
        if origin.kind == "spooled":
            row[RAW] = packed_row(spool.content(row[RAW], row.pop(spool.BLOBS)))
        return row | mark
    content = source if isinstance(source, UnreadableRow) else row_values(source, found.at)
    return {PATH: read.path, NUMBER: read.number + at, ROOT: origin.root, RAW: packed_row(content)} | mark
