"""Pieces of parquet files: what is shuffled first where rows stream, and read at once.

Knows nothing of what a column means.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

CHEAP = 32 << 20
"""Bytes of a row group that may be read again for each of its pieces."""

_AT_ONCE = 16
"""Files whose metadata are read at a time."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a row group."""

    path: str
    group: int
    start: int
    stop: int
    number: int
    """Number in the file, from 1, of the group's first row."""
    bytes: int
    """About how many it takes in the file."""
    bad: tuple[int, ...] = ()
    """Places in the piece, in rising order, of rows that cannot be used."""

    @property
    def good(self) -> int:
        """Rows that can be used."""
        return self.stop - self.start - len(self.bad)


def pieces_of(
    filesystem: fs.FileSystem, paths: Sequence[str], *, rows: int, limit: int | None = None
) -> list[Piece] | None:
    """Returns the pieces of parquet files in their order, of at most `rows` rows; the first `limit` rows only.

    None where a row group is too large to be read for a part of its rows, or a file's metadata cannot be read.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        metadata = list(pool.map(partial(_metadata, filesystem), paths))
    pieces: list[Piece] = []
    left = sum(found.num_rows for found in metadata if found) if limit is None else limit
    for path, found in zip(paths, metadata, strict=True):
        if found is None:
            return None
        number = 1
        for i in range(found.num_row_groups):
            group = found.row_group(i)
            if group.num_rows > rows and group.total_byte_size > CHEAP:
                return None
            size = sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            taken = min(group.num_rows, left)
            for start in range(0, taken, rows):
                stop = min(start + rows, taken)
                pieces.append(Piece(path, i, start, stop, number, size * (stop - start) // group.num_rows))
            number += group.num_rows
            left -= taken
    return pieces


def _metadata(filesystem: fs.FileSystem, path: str) -> pq.FileMetaData | None:
    try:
        with filesystem.open_input_file(path) as stream:
            return pq.read_metadata(stream)
    except (OSError, pa.ArrowException):
        return None


def read_group(filesystem: fs.FileSystem, path: str, group: int, known: Collection[str] | None) -> pa.Table:
    """Returns a row group of a parquet file, of all columns or those `known`. Raises OSError or ArrowException."""
    with filesystem.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        names = file.schema_arrow.names if known is None else [n for n in file.schema_arrow.names if n in known]
        return file.read_row_group(group, columns=names or None)
