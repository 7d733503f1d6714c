"""Rows of a source: read as a Ray Dataset, counted, fingerprinted, turned into records one by one.

- Files of all formats become raw rows of the same columns (`raw_row`): one broken line costs one row, files may differ in
  their columns, and an unreadable file is reported as one bad row.
- Rows are identified by file and number: two rows with the same id are two rows.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import ray
from ray.data import TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.expressions import col

from pipeline.config import SourceConfig, without_secrets
from pipeline.data.errors import BadRow
from pipeline.data.errors import StreamError as StreamError
from pipeline.data.rows.records import Record
from pipeline.data.sources import mmbench
from pipeline.data.sources.files import resolve
from pipeline.data.sources.formats import rows_of
from pipeline.data.sources.presets import wanted_columns
from pipeline.data.sources.raw_row import NUMBER, PATH, RAW, ROOT, RawRow, packed_row
from pipeline.data.sources.storage import unreachable
from pipeline.storage.mirror import Folder

_SCHEMA = pa.schema([(PATH, pa.string()), (NUMBER, pa.int64()), (ROOT, pa.string()), (RAW, pa.binary())])
_BLOCK_ROWS, _BLOCK_BYTES = 256, 16 << 20
"""Most rows and most bytes of a block that Ray gets."""
_HASHED_BYTES = 64 << 20
"""Files up to this size are fingerprinted by content, larger ones by size and time of change."""
_SAMPLE = 200
"""Rows of a text file from whose length the number of rows is estimated."""
_COUNTED = 64
"""Files of a source from which the number of rows is estimated."""
_COMPRESSION = 4
"""Assumed ratio of a text's size to its compressed size."""


Place = tuple[str, int]
"""File, and number of a row in it: rows come in the order of their places."""


def read(
    source: SourceConfig,
    folder: Folder,
    *,
    readers: int | None = None,
    also: Collection[str] = (),
    since: Place | None = None,
    answered: bool = True,
) -> ray.data.Dataset:
    """Returns the raw rows of a source as a lazy Ray Dataset. Raises StreamError where `resolve` does.

    `readers` is the number of tasks that will process the rows in parallel. A quarter as many read: reading is faster than
    processing, and raw rows would pile up in the object store. `also` are columns that are read beside those that the source
    names; rows before the place `since` are left out. Without `answered` rows need no answers.
    """
    compute = None if readers is None else TaskPoolStrategy(max(1, readers // 4))
    rows = ray.data.read_datasource(_Rows(source, folder, also, since, answered), compute=compute)
    if since is None:
        return rows
    file, number = since
    return rows.filter(expr=(col(PATH) > file) | ((col(PATH) == file) & (col(NUMBER) >= number)))


class _Rows(Datasource):
    """Reads one file per task; all files in one task where rows depend on earlier rows (a limit, MMBench's rotations)."""

    def __init__(
        self,
        source: SourceConfig,
        folder: Folder,
        also: Collection[str] = (),
        since: Place | None = None,
        answered: bool = True,
    ) -> None:
        super().__init__()
        self._filesystem, files, self._format = resolve(source, folder)
        self._files = [(file.path, file.size or 0) for file in files]  # pyarrow's own entries cannot be pickled
        self._together = source.limit is not None or source.preset == "mmbench"
        if since is not None and not self._together:
            self._files = [(path, size) for path, size in self._files if path >= since[0]]
        self._source, self._columns, self._answered = source, wanted_columns(source) | frozenset(also), answered
        self._root = image_root(source)

    def get_name(self) -> str:
        """Returns the name that Ray shows."""
        return self._format.capitalize()

    def estimate_inmemory_data_size(self) -> int:
        """Returns the bytes of all files."""
        return sum(size for _, size in self._files)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Returns the tasks, at most `parallelism`."""
        count = 1 if self._together else max(1, min(parallelism, len(self._files)))
        edges = [len(self._files) * i // count for i in range(count + 1)]
        tasks = []
        for start, end in zip(edges, edges[1:], strict=False):
            files = self._files[start:end]
            paths = [path for path, _ in files]
            size = sum(size for _, size in files)
            metadata = BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=tuple(paths))
            rows = partial(_raw_rows, self._filesystem, paths, self._format, self._source, self._columns, self._root)
            work = partial(_tables, partial(rows, answered=self._answered))
            tasks.append(ReadTask(work, metadata, _SCHEMA, per_task_row_limit))
        return tasks


def image_root(source: SourceConfig) -> str:
    """Returns the absolute folder of image paths, which is the same on all workers; empty: the file's folder."""
    path = source.image_root or ""
    return path if "://" in path or not path else str(Path(path).expanduser().resolve())


def _tables(raw_rows: Callable[[], Iterable[dict[str, Any]]]) -> Iterator[pa.Table]:
    """Yields raw rows in tables."""
    rows: list[dict[str, Any]] = []
    size = 0
    for row in raw_rows():
        rows.append(row)
        size += len(row[RAW])
        if len(rows) == _BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield pa.Table.from_pylist(rows, schema=_SCHEMA)
            rows, size = [], 0
    yield pa.Table.from_pylist(rows, schema=_SCHEMA)


def _raw_rows(
    filesystem: fs.FileSystem,
    paths: Sequence[str],
    file_format: str,
    source: SourceConfig,
    columns: Collection[str],
    root: str,
    *,
    answered: bool = True,
) -> Iterator[dict[str, Any]]:
    def numbered() -> Iterable[mmbench.Numbered]:
        return (
            (path, number, row) for path in paths for number, row in rows_of(filesystem, path, file_format, columns)
        )

    circular = source.preset == "mmbench"
    for path, number, row in (
        mmbench.questions(numbered, source.limit, answered=answered) if circular else islice(numbered(), source.limit)
    ):
        yield {PATH: path, NUMBER: number, ROOT: root, RAW: packed_row(row)}


def first_records(source: SourceConfig, folder: Folder, prompt: str, count: int) -> Iterator[Record]:
    """Yields the first good records of a source, read in this process (for samples)."""
    filesystem, files, file_format = resolve(source, folder)
    root = image_root(source)
    good = 0
    paths, columns = [file.path for file in files], wanted_columns(source)
    for row in islice(_raw_rows(filesystem, paths, file_format, source, columns, root), 4 * count):
        try:
            yield RawRow.of(row).record(source, prompt)
        except BadRow:
            continue
        good += 1
        if good == count:
            return


def count_rows(source: SourceConfig, folder: Folder) -> int:
    """Estimates the number of rows: from parquet's metadata, or from the first rows of a text.

    For small files the number is exact. Of more than `_COUNTED` files some are counted, and the rest is extrapolated by bytes.
    """
    filesystem, files, file_format = resolve(source, folder)
    counted = files[:: -(-len(files) // _COUNTED)]
    rows = sum(_count(filesystem, file, file_format, wanted_columns(source)) for file in counted)
    if len(counted) < len(files):
        rows = rows * sum(file.size for file in files) // max(1, sum(file.size for file in counted))
    rows *= 4 if source.preset == "mmbench" else 1  # at most: a question has up to four rotations
    return min(rows, source.limit) if source.limit else rows


def _count(filesystem: fs.FileSystem, file: fs.FileInfo, file_format: str, columns: frozenset[str]) -> int:
    if file_format == "parquet":
        try:
            with filesystem.open_input_file(file.path) as opened:
                return pq.read_metadata(opened).num_rows
        except (OSError, pa.ArrowException):
            return 1  # a damaged file is reported as one bad row
    lengths = [len(packed_row(row)) for _, row in islice(rows_of(filesystem, file.path, file_format, columns), _SAMPLE)]
    if len(lengths) < _SAMPLE:
        return len(lengths)
    size = file.size * (1 if PurePosixPath(file.path).suffix.lower() == f".{file_format}" else _COMPRESSION)
    return max(_SAMPLE, size * _SAMPLE // sum(lengths))


def fingerprint(source: SourceConfig, folder: Folder) -> str:
    """Returns 16 hex digits that change when a source's files or reading settings change, but not with the credentials used.

    Images that rows refer to by path are not included.
    """
    filesystem, files, file_format = resolve(source, folder)
    root = source.image_root and without_secrets(source.image_root)
    named = source.model_copy(update={"image_root": root}).to_identity(exclude={"path", "format", "cache"})
    settings = json.dumps(named, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(f"{file_format} {settings}".encode())
    try:
        for file in files:
            digest.update(f"{PurePosixPath(file.path).name} {file.size}".encode())
            if file.size <= _HASHED_BYTES:
                with filesystem.open_input_file(file.path) as opened:
                    digest.update(opened.read())
            else:
                digest.update(str(file.mtime_ns).encode())
    except (OSError, pa.ArrowException) as error:
        raise unreachable(source.path, error) from None
    return digest.hexdigest()[:16]
