"""The rows of one file, by its format: parquet, jsonl, json, tsv, csv.

- Files are streamed: a row, or a small batch of parquet, is in memory at a time.
- Texts may be compressed (.gz, .bz2, .zst, .lz4, by their ending), start with a byte order mark, and hold bytes that are not
  UTF-8: those pass as surrogates (PEP 383), so that only rows that use them are bad.
- An unreadable row yields an UnreadableRow in its place; the rest of the file is read. An UnreadableRow for more than a row
  (a file, its end, a row group) names the lost part.
- Independent of what a column means.
"""

import csv
import io
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from pipeline.data.errors import StreamError, UnreadableRow, first_line, printable
from pipeline.data.rows.json_stream import WHOLE_FILE, JsonStream, breaks_off, parse

Row = dict[str, Any] | UnreadableRow

LONGEST_LINE = 1 << 28
"""Characters of the longest line of JSON, or record of a table, that is read."""

_ENDINGS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".tsv": "tsv", ".csv": "csv"}
_COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
_BATCH = 32
"""Rows per batch of parquet; a row may hold megabytes."""


def format_of(path: str) -> str:
    """Returns a file's format by its ending; empty if unknown."""
    endings = PurePosixPath(path.lower()).suffixes
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return _ENDINGS.get(endings[-1], "") if endings else ""


def rows_of(
    filesystem: fs.FileSystem, path: str, file_format: str, columns: Collection[str]
) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a file with their numbers: lines of a text, places in an array or table, from 1.

    `columns` are the columns needed; only these are read from parquet. Raises StreamError where storage fails; a damaged
    file yields an UnreadableRow.
    """
    number = 0
    try:
        for number, row in _READERS[file_format](filesystem, path, columns):  # noqa: B007 - needed after the loop
            yield number, row
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if of_network(filesystem, error):
            raise StreamError(f"{path}: cannot be read: {first_line(error)}") from None
        where = f"beyond its row {number}" if number else "at all"
        yield (
            number + 1,
            UnreadableRow(
                f"{PurePosixPath(path).name}: the file cannot be read {where}: {first_line(error)}",
                lost=f"all rows beyond row {number}" if number else WHOLE_FILE,
                rows=0,
            ),
        )


def of_network(filesystem: fs.FileSystem, error: Exception) -> bool:
    """Whether the network caused the error, not the file: it may recover, so no row must be lost."""
    signs = ("AWS Error", "google::cloud", "Azure", "curl", "HTTP")
    return filesystem.type_name != "local" and any(sign in str(error) for sign in signs)


def _open(filesystem: fs.FileSystem, path: str, newline: str) -> io.TextIOWrapper:
    file = filesystem.open_input_stream(path)  # decompresses by the file's ending
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _jsonl(filesystem: fs.FileSystem, path: str, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    with _open(filesystem, path, "\n") as text:
        number = 0
        while line := text.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                while (rest := text.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                    pass
                reason = f"a line of more than {LONGEST_LINE:,} characters (is the file one JSON array? Then say format: json)"
                yield number, UnreadableRow(reason, printable(line))
            elif line.strip("\ufeff \t\r\n"):
                yield number, _object(line.lstrip("\ufeff"), number)


def _object(line: str, number: int) -> Row:
    try:
        row = parse(line)
    except ValueError as error:
        # Only the last line has no line break; JSON that breaks off there was cut, and rows after it may be missing.
        cut = not line.endswith("\n") and breaks_off(line)
        return UnreadableRow(str(error), printable(line), lost=f"all rows beyond row {number}" if cut else "")
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(element: Any) -> UnreadableRow:
    return UnreadableRow(f"a row must be a JSON object, found {type(element).__name__}", printable(repr(element)))


def _json(filesystem: fs.FileSystem, path: str, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    with _open(filesystem, path, "") as text:
        for number, element in enumerate(JsonStream(text, columns), start=1):
            yield number, element if isinstance(element, (dict, UnreadableRow)) else _no_object(element)


class _TooLongError(csv.Error):
    """A record that is longer than any that is read."""


class _Lines:
    """Lines of a text; the lines of a broken record can be read again."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text, self._again = text, deque[str]()
        self.record: list[str] = []
        """Lines of the record that is being read."""
        self.number = 0
        """Number of the last line that was read."""
        self._characters = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._text)
        self.record.append(line)
        self.number += 1
        self._characters = len(line) + (self._characters if len(self.record) > 1 else 0)
        if self._characters > LONGEST_LINE:
            raise _TooLongError(f"a record of more than {LONGEST_LINE:,} characters")
        return line

    def put_back(self) -> None:
        """Puts all but the first line of the record back."""
        self._again.extendleft(reversed(self.record[1:]))
        self.number -= len(self.record) - 1


def _table(delimiter: str) -> Callable[..., Iterator[tuple[int, Row]]]:
    """Returns the reader of tables whose cells are separated by `delimiter`; empty cells are None.

    A record that does not fit the header costs only its first line: an unclosed quote must not swallow the lines after it.
    """

    def read(filesystem: fs.FileSystem, path: str, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
        # The limit is the process's: others (importlib.metadata reads tables, too) must not find it lowered.
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
        with _open(filesystem, path, "") as text:
            lines = _Lines(text)
            records = csv.reader(lines, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(records, [])]
            if any("\x00" in name for name in names):
                yield (
                    1,
                    UnreadableRow(
                        "the file holds NUL characters: is it UTF-16? Save it as UTF-8", lost=WHOLE_FILE, rows=0
                    ),
                )
                return
            if not names:
                yield (
                    1,
                    UnreadableRow(
                        "the file is empty: not even a line with the columns' names", lost=WHOLE_FILE, rows=0
                    ),
                )
                return
            if (twice := _twice(names, columns)) is not None:
                yield 1, twice
                return
            number = 0
            while True:
                lines.record.clear()
                cells, problem = _cells(records, lines, delimiter)
                if not lines.record:
                    return
                if len(cells) == len(names):
                    number += 1
                    yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}
                elif cells or problem:
                    number += 1
                    lines.put_back()
                    what = problem or f"{len(cells)} cells, the header has {len(names)}"
                    line = lines.record[0]
                    # Only the last line has no line break; with cells missing it was cut, and rows after it may be missing.
                    cut = len(cells) < len(names) and not line.endswith(("\n", "\r"))
                    reason = f"line {lines.number}: {what} (a quote that is not closed, a cut file?)"
                    lost = f"all rows beyond row {number}" if cut else ""
                    yield number, UnreadableRow(reason, printable(line.rstrip()), lost=lost)

    return read


def _twice(names: Sequence[str], columns: Collection[str]) -> UnreadableRow | None:
    """Returns what takes the place of a table in which one of the `columns` needed is not the only one of its name."""
    twice = next((name for name in columns if names.count(name) > 1), None)
    if twice is None:
        return None
    return UnreadableRow(f"{names.count(twice)} columns are called {twice!r}: rename one", lost=WHOLE_FILE, rows=0)


def _cells(records: Iterator[list[str]], lines: _Lines, delimiter: str) -> tuple[list[str], str]:
    """Returns the cells of the next record (none at the end) and the error in it."""
    try:
        return next(records, []), ""
    except _TooLongError as error:
        return [], str(error)
    except csv.Error as error:
        if len(lines.record) == 1:  # quotes inside a cell that are not doubled
            with suppress(csv.Error):
                return next(csv.reader(lines.record, delimiter=delimiter)), str(error)
        return [], str(error)


def _parquet(filesystem: fs.FileSystem, path: str, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    with filesystem.open_input_file(path) as opened:
        file = pq.ParquetFile(opened)
        names = [name for name in file.schema_arrow.names if name in columns]
        if (twice := _twice(names, columns)) is not None:
            yield 1, twice
            return
        done = 0
        for group in range(file.num_row_groups):
            first, done = done, done + file.metadata.row_group(group).num_rows
            last = first
            try:
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names or None):
                    for i in range(len(batch)):
                        last += 1
                        yield last, row_values(batch, i)
            except (OSError, pa.ArrowException) as error:
                if of_network(filesystem, error):
                    raise
                reason = f"row group {group} of {PurePosixPath(path).name} cannot be read: {first_line(error)}"
                yield last + 1, UnreadableRow(reason, lost=f"rows {last + 1} to {done}", rows=done - last)


def row_values(batch: pa.RecordBatch, i: int) -> Row:
    """Returns row `i` of a batch of parquet."""
    try:
        return dict(zip(batch.schema.names, (column[i].as_py() for column in batch.columns), strict=True))
    except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is not UTF-8, a date before the year 1
        return UnreadableRow(f"a value cannot be read: {first_line(error)}")


_READERS: Mapping[str, Callable[..., Iterator[tuple[int, Row]]]] = {
    "parquet": _parquet, "jsonl": _jsonl, "json": _json, "tsv": _table("\t"), "csv": _table(","),
}  # fmt: skip
