"""Where rows come from: parquet and jsonl files, read by Ray Data; their fingerprints; a few rows to show.

A raw row is a user's row plus `PATH`, the file it came from; a line of jsonl stays text until validation, so that one
broken line costs one row and not the file.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as fs
import pyarrow.parquet as pq
import ray

from pipeline.config import SourceConfig
from pipeline.streams.embedded.files import SCHEME, embedded_file
from pipeline.streams.records import BadRow, Record, parse_line, to_record

PATH, LINE = "path", "text"
"""Columns that reading adds: the file of a row, and a jsonl line as it stands."""

_HASHED_BYTES = 64 << 20
"""Files up to this size are fingerprinted by content, larger ones by size and time of change."""


class StreamError(ValueError):
    """Data that cannot be found or used; the message names path and remedy."""


def resolve(source: SourceConfig, folder: Path) -> tuple[fs.FileSystem, list[fs.FileInfo], str]:
    """Finds a source's files: filesystem, files in order of their names, and format (`parquet` or `jsonl`).

    `folder` is where embedded data are written. Raises StreamError when there are none.
    """
    path = str(embedded_file(source.path, folder)) if source.path.startswith(SCHEME) else source.path
    if "://" not in path:
        path = str(Path(path).expanduser().resolve())
    pattern = path.rsplit("/", 1)[-1] if any(c in path.rsplit("/", 1)[-1] for c in "*?[") else None
    filesystem, place = fs.FileSystem.from_uri(path.rsplit("/", 1)[0] if pattern else path)
    info = filesystem.get_file_info(place)
    if info.type == fs.FileType.Directory:
        found = filesystem.get_file_info(fs.FileSelector(place, recursive=True))
        files = sorted((f for f in found if f.type == fs.FileType.File), key=lambda f: f.path)
        if pattern:
            files = [f for f in files if Path(f.path).match(pattern)]
    else:
        files = [info] if info.type == fs.FileType.File else []
    files = [f for f in files if source.format != "auto" or _format(f.path)]
    if not files:
        raise StreamError(f"{source.path}: no parquet or jsonl files there (is the path right, and mounted here?)")
    formats = {source.format if source.format != "auto" else _format(f.path) for f in files}
    if len(formats) != 1:
        raise StreamError(f"{source.path}: parquet and jsonl mixed; give a glob such as {source.path}/*.parquet")
    return filesystem, files, str(formats.pop())


def _format(path: str) -> str:
    return {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(Path(path).suffix.lower(), "")


def read(source: SourceConfig, folder: Path) -> ray.data.Dataset:
    """Returns the raw rows of a source as a lazy Ray Dataset with the column `PATH`."""
    filesystem, files, kind = resolve(source, folder)
    paths = [file.path for file in files]
    if kind == "jsonl":
        rows = ray.data.read_text(paths, filesystem=filesystem, include_paths=True, drop_empty_lines=True)
    else:
        rows = ray.data.read_parquet(paths, filesystem=filesystem, include_paths=True)
    return rows.limit(source.limit) if source.limit else rows


def count_rows(source: SourceConfig, folder: Path) -> int:
    """Returns about how many rows there are: from parquet's metadata, or by counting lines (empty ones too)."""
    filesystem, files, kind = resolve(source, folder)
    rows = 0
    for file in files:
        if kind == "parquet":
            with filesystem.open_input_file(file.path) as stream:
                rows += pq.read_metadata(stream).num_rows
        else:
            with filesystem.open_input_stream(file.path) as stream:
                while block := stream.read(1 << 22):
                    rows += block.count(b"\n")
            rows += 1  # a last line without an end
    return min(rows, source.limit) if source.limit else rows


def fingerprint(source: SourceConfig, folder: Path) -> str:
    """Returns 16 hex digits that change when a source's files change."""
    filesystem, files, kind = resolve(source, folder)
    digest = hashlib.sha256(f"{kind} {source.limit} {source.columns.model_dump_json()}".encode())
    for file in files:
        digest.update(f"{Path(file.path).name} {file.size}".encode())
        if file.size <= _HASHED_BYTES:
            with filesystem.open_input_stream(file.path) as stream:
                digest.update(stream.read())
        else:
            digest.update(str(file.mtime_ns).encode())
    return digest.hexdigest()[:16]


def row_id(row: dict[str, Any], source: SourceConfig) -> str:
    """Returns the id of a raw row, good or bad; where it has none, its file and a hash of its content."""
    path, content = str(row.get(PATH, "")), _content(row)
    values = content
    if isinstance(content, str):
        try:
            values = parse_line(content)
        except BadRow:
            values = {}
    if values.get(source.columns.id) is not None:
        return str(values[source.columns.id])
    return f"{Path(path).name}#{hashlib.sha256(repr(content).encode()).hexdigest()[:10]}"


def record_of(row: dict[str, Any], source: SourceConfig, prompt: str) -> Record:
    """Turns a raw row into a record; raises BadRow."""
    content = _content(row)
    values = parse_line(content) if isinstance(content, str) else content
    folder = Path(str(row.get(PATH, ""))).parent
    return to_record(values, source.columns, name=row_id(row, source), prompt=prompt, folder=folder)


def _content(row: dict[str, Any]) -> Any:
    """Returns a jsonl line as text, or a row of columns as it is."""
    return row[LINE] if set(row) <= {LINE, PATH} else row


def first_records(source: SourceConfig, folder: Path, prompt: str, count: int) -> Iterator[Record]:
    """Yields the first good records of a source, read here and now (for showing samples)."""
    filesystem, files, kind = resolve(source, folder)
    path = files[0].path
    if kind == "parquet":
        with filesystem.open_input_file(path) as stream:
            batch = next(pq.ParquetFile(stream).iter_batches(batch_size=2 * count), None)
            rows = batch.to_pylist() if batch is not None else []
    else:
        with filesystem.open_input_stream(path) as stream:
            rows = [{LINE: line} for line in stream.read(1 << 22).decode(errors="replace").splitlines()[: 2 * count]]
    good = 0
    for row in rows:
        try:
            yield record_of(row | {PATH: path}, source, prompt)
        except BadRow:
            continue
        good += 1
        if good == count:
            return


def excerpt(row: dict[str, Any]) -> str:
    """Returns the beginning of a raw row as text, for the quarantine file."""
    shown = row[LINE] if LINE in row else json.dumps(row, default=lambda value: f"<{type(value).__name__}>")
    return str(shown)[:300]
