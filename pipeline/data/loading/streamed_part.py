"""Rows that stream: a task's rows in pieces of parquet files, and how Ray Data goes through all of them once."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow.fs as fs
import ray
from ray.data import TaskPoolStrategy
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipeline.config import DataConfig, digest
from pipeline.data.encoded.encoding import Encoder, encode_batch
from pipeline.data.encoded.image_embeds import DONE
from pipeline.data.errors import StreamError
from pipeline.data.loading import spool
from pipeline.data.loading.piece_reader import BLOCK_ROWS, Origin, in_order, tables
from pipeline.data.loading.pieces import Pieces, pieces_of
from pipeline.data.loading.windows import LANES
from pipeline.data.sources.files import resolve
from pipeline.data.sources.reader import fingerprint, image_root
from pipeline.storage.mirror import Folder, Mirror, made_at


@dataclass(frozen=True)
class StreamedPart:
    """A part's rows, in pieces of parquet files."""

    origin: Origin
    pieces: Pieces

    @property
    def count(self) -> int:
        """Good rows."""
        return int(self.pieces.good.sum())

    def in_order(self) -> ray.data.Dataset:
        """Returns the encoded rows lazily, in the order of the files, with their `POSITION`; bad ones have a `reason`."""
        readers = self.origin.encoder.data.num_readers
        rows = ray.data.read_datasource(_InOrder(self), compute=TaskPoolStrategy(max(1, readers // 4)))
        if self.origin.contents == "encoded":
            return rows
        work = partial(encode_batch, encoders=[self.origin.encoder])
        return rows.map_batches(work, batch_size=BLOCK_ROWS, batch_format="pyarrow", compute=TaskPoolStrategy(readers))

    def without(self, bad: np.ndarray) -> "StreamedPart":
        """Returns the part without the rows at these rising indices (among all rows of the pieces)."""
        return replace(self, pieces=replace(self.pieces, bad=bad))


class _InOrder(Datasource):
    """Reads the pieces of a part; each task reads consecutive ones."""

    def __init__(self, part: StreamedPart) -> None:
        super().__init__()
        self._part = part

    def get_name(self) -> str:
        """Returns the name that Ray shows."""
        return "Pieces"

    def estimate_inmemory_data_size(self) -> int:
        """Returns the bytes of all pieces."""
        return int(self._part.pieces.bytes.sum())

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Returns the tasks, at most `parallelism`."""
        pieces = self._part.pieces
        edges = np.linspace(0, len(pieces), max(1, min(parallelism, len(pieces))) + 1).astype(int).tolist()
        tasks = []
        for start, end in zip(edges, edges[1:], strict=False):
            some = pieces.some(start, end)
            metadata = BlockMetadata(
                num_rows=int(some.good.sum()), size_bytes=int(some.bytes.sum()), exec_stats=None, input_files=some.paths
            )
            work = partial(_read, self._part.origin, some)
            tasks.append(ReadTask(work, metadata, None, per_task_row_limit))
        return tasks


def _read(origin: Origin, pieces: Pieces) -> Any:
    return tables(in_order([origin], map(pieces.read, range(len(pieces)))))


def streamed_part(encoder: Encoder, data_folder: Folder) -> StreamedPart:
    """Returns the rows of a source in pieces; copies files first that cannot be read from the middle."""
    source = encoder.part.source
    filesystem, files, file_format = resolve(source, data_folder)
    paths = [file.path for file in files]
    if file_format == "parquet" and source.preset != "mmbench":
        pieces = pieces_of(filesystem, paths, rows=piece_rows(encoder.data), limit=source.limit)
        if pieces is not None:
            return StreamedPart(Origin(encoder, filesystem, "own", image_root(source)), pieces)
    key = digest(fingerprint(source, data_folder), paths)
    copies = Mirror.of(data_folder) / "rows" / f"{encoder.task}-{key}"
    made = spool.spooled(source, data_folder, copies, readers=encoder.data.num_readers)
    return _own(encoder, "spooled", *made)


def streamed_image_embeds(encoder: Encoder, folder: Folder) -> StreamedPart:
    """Returns the encoded rows in a folder of parquet files, which is complete, in pieces."""
    place = made_at(folder, DONE)
    assert place is not None, "callers have made it"
    return _own(encoder, "encoded", *place)


def _own(
    encoder: Encoder, contents: Literal["spooled", "encoded"], filesystem: fs.FileSystem, folder: str
) -> StreamedPart:
    """Returns the rows of files that this project has written, in pieces."""
    infos = filesystem.get_file_info(fs.FileSelector(folder))
    paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    pieces = pieces_of(filesystem, paths, rows=piece_rows(encoder.data))
    if pieces is None:
        raise StreamError(f"{paths[0]} and its neighbours: damaged; remove the folder, and it is written again")
    return StreamedPart(Origin(encoder, filesystem, contents), pieces)


def piece_rows(data: DataConfig) -> int:
    """Returns the rows of a piece: rows are drawn from sixteen of them at a time."""
    return data.shuffle_rows // LANES
