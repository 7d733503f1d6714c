"""Pieces of parquet files: the units that are shuffled and read when rows are streamed.

There may be tens of thousands, so they are stored as arrays, not objects. Independent of what a file's columns mean.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

CHEAP = 32 << 20
"""Bytes of a row group that may be read again for each of its pieces."""

JOINED = 16 << 20
"""Compressed bytes up to which consecutive small row groups are joined into one piece."""

_FILES_AT_ONCE = 16
"""Files whose metadata are read in parallel."""

_LOG_SECONDS = 10.0
"""Interval between progress messages while metadata are read."""

_COLUMNS = {
    "file": np.int32, "group": np.int32, "groups": np.int32, "number": np.int64, "skipped": np.int32, "rows": np.int32,
    "bytes": np.int64,
}  # fmt: skip

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadRequest:
    """A request for rows of a piece."""

    part: int
    """Index of the piece's part among all parts."""
    path: str
    group: int
    """Number of the first row group that is read."""
    groups: int
    """How many of them."""
    at: np.ndarray
    """Rising indices of the requested rows in these groups together (N,)."""
    number: int
    """Number in the file, from 1, of the first row of these groups."""
    offset: int
    """Index in the part of that row."""


@dataclass(frozen=True)
class Pieces:
    """P pieces in the files' order: each holds rows of a row group, or of some that follow each other in a file."""

    paths: tuple[str, ...]
    """Of the files."""
    file: np.ndarray
    """Index of each piece's file among the paths (P,)."""
    group: np.ndarray
    """Number of its first row group (P,)."""
    groups: np.ndarray
    """How many row groups hold it (P,)."""
    number: np.ndarray
    """Number in the file, from 1, of the first row of these groups (P,)."""
    skipped: np.ndarray
    """Rows of these groups before the piece (P,)."""
    rows: np.ndarray
    """Its rows (P,)."""
    bytes: np.ndarray
    """Approximate compressed bytes (P,)."""
    bad: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rising indices of bad rows."""
    offset: int = 0
    """Index of the first row, where these are some of a part's pieces."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """Indices of the pieces' first rows among the rows of all pieces (P,)."""
        return self.offset + np.cumsum(self.rows, dtype=np.int64) - self.rows

    @property
    def good(self) -> np.ndarray:
        """Good rows per piece (P,)."""
        return self.rows - np.diff(np.searchsorted(self.bad, [self.starts, self.starts + self.rows]), axis=0)[0]

    def some(self, start: int, stop: int) -> "Pieces":
        """Returns pieces `start` to `stop`, with only the paths that they need."""
        part = slice(start, stop)
        columns: dict[str, Any] = {name: getattr(self, name)[part] for name in _COLUMNS}
        files, file = np.unique(self.file[part], return_inverse=True)
        columns["file"] = file.astype(np.int32)
        offset = int(self.starts[start]) if start < stop else self.offset
        bad = self.bad[slice(*np.searchsorted(self.bad, [offset, offset + int(columns["rows"].sum())]))]
        return Pieces(tuple(self.paths[i] for i in files), **columns, bad=bad, offset=offset)

    def read(self, piece: int, numbers: np.ndarray | None = None, *, part: int = 0) -> ReadRequest:
        """Returns a request for a piece's good rows, or for those with these indices among them (N,)."""
        start, rows, skipped = (int(column[piece]) for column in (self.starts, self.rows, self.skipped))
        bad = self.bad[slice(*np.searchsorted(self.bad, [start, start + rows]))]
        good = np.delete(np.arange(skipped, skipped + rows), bad - start)
        return ReadRequest(
            part=part,
            path=self.paths[self.file[piece]],
            group=int(self.group[piece]),
            groups=int(self.groups[piece]),
            at=good if numbers is None else good[numbers],
            number=int(self.number[piece]),
            offset=start - skipped,
        )


def pieces_of(filesystem: fs.FileSystem, paths: Sequence[str], *, rows: int, limit: int | None = None) -> Pieces | None:
    """Returns the pieces of parquet files in their order, of at most `rows` rows; the first `limit` rows only.

    None where a row group is too large to be read for a part of its rows, or a file's metadata cannot be read.
    """
    pieces: list[tuple[int, int, int, int, int, int, int]] = []
    left = limit
    for file, groups in enumerate(row_groups(filesystem, paths)):
        if groups is None or ((groups[:, 0] > rows) & (groups[:, 2] > CHEAP)).any():
            return None
        number, joined = 1, -1
        for group, (count, size, _) in enumerate(groups.tolist()):
            kept = count if left is None else min(count, left)
            left = None if left is None else left - kept
            if kept == 0:
                joined = -1
            elif joined >= 0 and pieces[joined][5] + kept <= rows and pieces[joined][6] + size <= JOINED:
                _, first, several, begin, _, before, bytes_ = pieces[joined]
                pieces[joined] = (file, first, several + 1, begin, 0, before + kept, bytes_ + size)
            else:
                for start in range(0, kept, rows):
                    part = min(rows, kept - start)
                    pieces.append((file, group, 1, number, start, part, size * part // count))
                joined = len(pieces) - 1 if kept <= rows else -1
            number += count
        if left == 0:
            break
    table = np.array(pieces, np.int64).reshape(-1, len(_COLUMNS)).T
    columns: dict[str, Any] = {
        name: column.astype(dtype) for (name, dtype), column in zip(_COLUMNS.items(), table, strict=True)
    }
    return Pieces(tuple(paths), **columns)


def row_groups(filesystem: fs.FileSystem, paths: Sequence[str]) -> Iterator[np.ndarray | None]:
    """Yields for each parquet file the rows of its row groups, their bytes in the file, and those in memory (G, 3).

    None where the metadata cannot be read. Logs its progress.
    """
    logged_at, chunk = time.monotonic(), 16 * _FILES_AT_ONCE
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for start in range(0, len(paths), chunk):
            yield from pool.map(partial(_row_groups, filesystem), paths[start : start + chunk])
            if time.monotonic() - logged_at > _LOG_SECONDS:
                logged_at = time.monotonic()
                _logger.warning("read what %d of %d files hold (%s ...)", start + chunk, len(paths), paths[0])


def _row_groups(filesystem: fs.FileSystem, path: str) -> np.ndarray | None:
    try:
        with filesystem.open_input_file(path) as opened:
            metadata = pq.read_metadata(opened)
    except (OSError, pa.ArrowException):
        return None
    sizes = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        size = sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        sizes.append((group.num_rows, size, group.total_byte_size))
    return np.array(sizes, np.int64).reshape(-1, 3)
