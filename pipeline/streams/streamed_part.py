"""Rows that stream: pieces of files are read in a planned order and encoded, on Ray Data, outside the training process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import ray
from ray.data import ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayError

from pipeline.config import DataConfig, digest
from pipeline.models.prompts import Encoded
from pipeline.streams import spool
from pipeline.streams.encoding import PLACE, WHICH, Encoder, encode_batch
from pipeline.streams.faults import Fault, StreamError, first_line
from pipeline.streams.files import resolve
from pipeline.streams.formats import Row, of_network, row_values
from pipeline.streams.layouts import wanted_columns
from pipeline.streams.packing import PACKED, unpack_row
from pipeline.streams.pieces import Piece, pieces_of, read_group
from pipeline.streams.sources import NUMBER, PATH, RAW, ROOT, fingerprint, image_root, packed_row
from pipeline.streams.windows import Window, file_windows

_BLOCK_ROWS, _BLOCK_BYTES = 64, 16 << 20
"""Raw rows that are handed on at a time: so many, or so many bytes."""


@dataclass(frozen=True)
class StreamedPart:
    """A part's rows, in pieces of parquet files."""

    encoder: Encoder
    filesystem: fs.FileSystem
    kind: Literal["own", "spooled", "encoded"]
    """What the files hold: the user's rows, copies of them (see `spool`), or encoded rows."""
    root: str
    """What the image paths of the user's rows count from; empty: their file's folder."""
    pieces: tuple[Piece, ...]

    @property
    def count(self) -> int:
        """Good rows."""
        return sum(piece.good for piece in self.pieces)

    def in_order(self) -> ray.data.Dataset:
        """Returns the encoded rows in the order of the files, lazily, with their `PLACE`; those that fail have a `reason`."""
        sizes = np.array([piece.good for piece in self.pieces], np.int64)
        return windows_dataset([self], list(file_windows(sizes)), readers=self.encoder.data.readers)

    def without(self, bad: np.ndarray) -> "StreamedPart":
        """Returns the part without the rows at these places (in rising order, among all rows of the pieces)."""
        pieces, start = [], 0
        for piece in self.pieces:
            stop = start + piece.stop - piece.start
            low, high = np.searchsorted(bad, [start, stop])
            pieces.append(replace(piece, bad=tuple((bad[low:high] - start).tolist())))
            start = stop
        return replace(self, pieces=tuple(pieces))


@dataclass(frozen=True)
class _Plan:
    """Windows over the pieces of all parts."""

    parts: tuple[StreamedPart, ...]
    windows: tuple[Window, ...]

    def read(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """Yields the rows of windows in their order, raw or encoded, a small table at a time."""
        for number in batch["window"].tolist():
            yield from _tables(self._rows(self.windows[number]))

    @cached_property
    def _pieces(self) -> list[tuple[int, int, Piece]]:
        """Of every piece: its part's number, the place of its first row, itself. Made once: there may be many windows."""
        return [
            (which, start, piece)
            for which, part in enumerate(self.parts)
            for start, piece in zip(_starts(part.pieces), part.pieces, strict=True)
        ]

    def _rows(self, window: Window) -> Iterator[dict[str, Any]]:
        pieces = self._pieces
        wanted = np.zeros(sum(stop - start for _, start, stop in window.reads), bool)
        wanted[window.order] = True
        reads, begin = [], 0
        for number, start, stop in window.reads:
            reads.append((pieces[number], start, stop, begin))
            begin += stop - start
        reads.sort(key=lambda read: (read[0][0], read[0][2].path, read[0][2].group))
        found: dict[int, dict[str, Any]] = {}
        last: tuple[int, str, int] | None = None
        for (which, place, piece), start, stop, begin in reads:
            part, key = self.parts[which], (which, piece.path, piece.group)
            if key != last:
                group, last = _Group(part, piece), key
            good = np.delete(np.arange(piece.start, piece.stop), list(piece.bad))[start:stop]
            for i, at in enumerate(good.tolist()):
                if wanted[begin + i]:
                    found[begin + i] = group.row(at) | {WHICH: which, PLACE: place + at - piece.start}
        for position in window.order.tolist():
            yield found.pop(position)


class _Group:
    """A row group that has been read."""

    def __init__(self, part: StreamedPart, piece: Piece) -> None:
        self._part, self._piece = part, piece
        known = wanted_columns(part.encoder.part.source) if part.kind == "own" else None
        self._fault: Fault | None = None
        try:
            table = read_group(part.filesystem, piece.path, piece.group, known)
            self._batch = table.combine_chunks().to_batches()[0]
        except (OSError, pa.ArrowException) as error:
            reason = f"row group {piece.group} of {PurePosixPath(piece.path).name} cannot be read: {first_line(error)}"
            if part.kind == "encoded" or of_network(part.filesystem, error):
                raise StreamError(f"{piece.path}: {reason}") from None
            self._fault = Fault(reason, lost=f"row group {piece.group}")

    def row(self, at: int) -> dict[str, Any]:
        """Returns row `at` of the group, as this kind of part has it."""
        if self._part.kind == "encoded":
            return {name: column[at].as_py() for name, column in self._columns()}
        if self._part.kind == "spooled" and not self._fault:
            row = {name: column[at].as_py() for name, column in self._columns()}
            return row | {RAW: packed_row(spool.content(row[RAW], row.pop(spool.BLOBS)))}
        content: Row = self._fault or row_values(self._batch, at)
        return {
            PATH: self._piece.path,
            NUMBER: self._piece.number + at,
            ROOT: self._part.root,
            RAW: packed_row(content),
        }

    def _columns(self) -> Iterator[tuple[str, pa.Array]]:
        return zip(self._batch.schema.names, self._batch.columns, strict=True)


def _starts(pieces: Sequence[Piece]) -> list[int]:
    return [0, *np.cumsum([piece.stop - piece.start for piece in pieces]).tolist()[:-1]]


def _tables(rows: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        held.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(held) == _BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield pa.Table.from_pylist(held)
            held, size = [], 0
    if held:
        yield pa.Table.from_pylist(held)


def windows_dataset(
    parts: Sequence[StreamedPart], windows: Sequence[Window], *, readers: int, cpus: float = 1
) -> ray.data.Dataset:
    """Returns the encoded rows of `windows` in their order, lazily; `readers` tasks work at a time, each holds `cpus`."""
    plan = _Plan(tuple(parts), tuple(windows))
    numbers = ray.data.from_items(
        [{"window": n} for n in range(len(windows))], override_num_blocks=max(1, len(windows))
    )
    rows = numbers.map_batches(
        plan.read, batch_size=1, batch_format="numpy", compute=TaskPoolStrategy(max(1, readers // 4)), num_cpus=cpus
    )
    if parts[0].kind == "encoded":
        return rows
    work = partial(encode_batch, encoders=[part.encoder for part in parts])
    return rows.map_batches(
        work, batch_size=_BLOCK_ROWS, batch_format="pyarrow", compute=TaskPoolStrategy(readers), num_cpus=cpus
    )


def encoded_windows(parts: Sequence[StreamedPart], windows: Sequence[Window], *, workers: int) -> Iterator[Encoded]:
    """Yields the rows of `windows`, for one of several workers that do so at a time.

    Its tasks book no CPUs: one whose rows nobody takes yet would hold them, and starve the other workers' tasks for ever.
    Raises StreamError where a row cannot be read any more.
    """
    if not windows:
        return
    data: DataConfig = parts[0].encoder.data
    rows = windows_dataset(parts, windows, readers=max(1, data.readers // workers), cpus=0)
    rows.context.target_max_block_size = 32 << 20  # what a task holds until it hands rows on
    options = rows.context.execution_options
    options.preserve_order = True
    store = ray.cluster_resources().get("object_store_memory", 0)
    options.resource_limits = ExecutionResources(object_store_memory=store / (4 * workers))
    batches = rows.iter_batches(batch_size=None, batch_format="pyarrow")
    try:
        for batch in batches:
            for i in range(len(batch)):
                if reason := batch["reason"][i].as_py():
                    where = f"{batch['source'][i].as_py()}: row {batch['id'][i].as_py()}"
                    raise StreamError(f"{where} could be read before training, and cannot any more: {reason}")
                yield unpack_row(*(batch[name][i].as_buffer() for name in PACKED))
    except RayError as error:
        raise StreamError(
            f"rows cannot be read: {first_line(error.cause if hasattr(error, 'cause') else error)}"
        ) from error


def streamed_part(encoder: Encoder, data_folder: Path) -> StreamedPart:
    """Returns the rows of a source in pieces; copied first where its files cannot be read from the middle."""
    source = encoder.part.source
    filesystem, files, kind = resolve(source, data_folder)
    rows, root = piece_rows(encoder.data), image_root(source)
    if kind == "parquet" and source.layout != "mmbench":
        pieces = pieces_of(filesystem, [file.path for file in files], rows=rows, limit=source.limit)
        if pieces is not None:
            return StreamedPart(encoder, filesystem, "own", root, tuple(pieces))
    key = digest(fingerprint(source, data_folder), [file.path for file in files])
    copies = spool.spooled(
        source, data_folder, data_folder / "rows" / f"{encoder.column}-{key}", readers=encoder.data.readers
    )
    return _local(encoder, "spooled", copies)


def streamed_features(encoder: Encoder, folder: Path) -> StreamedPart:
    """Returns the encoded rows in a folder of parquet files in pieces."""
    return _local(encoder, "encoded", sorted(str(file) for file in folder.glob("*.parquet")))


def _local(encoder: Encoder, kind: Literal["spooled", "encoded"], paths: Sequence[str]) -> StreamedPart:
    pieces = pieces_of(fs.LocalFileSystem(), paths, rows=piece_rows(encoder.data))
    if pieces is None:
        raise StreamError(f"{paths[0]} and its neighbours: damaged; remove the folder, it is written again")
    return StreamedPart(encoder, fs.LocalFileSystem(), kind, "", tuple(pieces))


def piece_rows(data: DataConfig) -> int:
    """Returns the rows of a piece: a window mixes sixteen of them."""
    return data.shuffle_rows // 16
