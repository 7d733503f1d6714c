"""The held-out rows of a task as prompts that a pool can be evaluated on.

Training holds rows out by number (`TrainingRows.split`); here they are written, once, to a file of canonical rows, which is
evaluated like any other task.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipeline.config import ColumnsConfig, SourceConfig, TaskConfig, digest
from pipeline.data.errors import BadRow
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.data.rows.records import Record
from pipeline.data.sources.raw_row import RawRow
from pipeline.data.sources.reader import read
from pipeline.files import atomic_file
from pipeline.storage.mirror import Folder, Mirror

ANSWERED = ColumnsConfig(question="question", answer="answers", choices="choices", group="group")
"""Columns of rows with accepted answers; others are conversations."""


def held_out_task(
    task: TaskConfig, rows: TrainingRows, seed: int, *, identity: str, data_folder: Folder, folder: Folder
) -> TaskConfig:
    """Returns a task whose evaluation rows are those that `task` holds out of its training `rows` with this seed.

    `identity` names the training rows; the file is written below `folder`.
    """
    assert task.train is not None, "only tasks with training rows hold some out"
    place, name = Mirror.of(folder), f"{task.name}-{digest(identity, task.prompt, task.validation, seed)}.parquet"
    turns = task.train.preset is None and task.train.columns.answer is None
    if not place.exists(name):
        _, held = rows.split(task.validation, seed)
        records = [_canonical(record, turns=turns) for record in _records(task, held, data_folder)]
        with atomic_file(place.local / name) as staging:
            pq.write_table(pa.Table.from_pylist(records, _SCHEMA), staging)
        place.share(name)
    source = SourceConfig(path=(place / name).uri, format="parquet", columns=ColumnsConfig() if turns else ANSWERED)
    return TaskConfig(name=f"{task.name[:39]}_held_out", eval=source, metric=task.metric)


_SCHEMA = pa.schema([
    ("id", pa.string()), ("messages", pa.string()), ("question", pa.string()), ("answers", pa.list_(pa.string())),
    ("choices", pa.string()), ("group", pa.string()), ("images", pa.list_(pa.binary())),
])  # fmt: skip


def _records(task: TaskConfig, held: TrainingRows, data_folder: Folder) -> Iterator[Record]:
    """Yields the held-out rows in the order of the files: found by file and id where they are cached, else by position."""
    assert task.train is not None, "only tasks with training rows hold some out"
    assert held.chosen is not None, "split off from training rows"
    keys, positions = set(), set()
    if held.cached:
        names = pa.concat_tables([block.select(["source", "id"]) for block in ray.get(list(held.blocks))])
        keys = {(row["source"], row["id"]) for row in names.take(held.chosen).to_pylist()}
    else:
        (part,) = held.parts
        positions = set(np.delete(np.arange(int(part.pieces.rows.sum())), part.pieces.bad)[held.chosen].tolist())
    for position, columns in enumerate(read(task.train, data_folder).iter_rows()):
        raw = RawRow.of(columns)
        if position in positions or (raw.path, raw.id(task.train)) in keys:
            try:
                yield raw.record(task.train, task.prompt)
            except BadRow:  # set aside in training too
                continue


def _canonical(record: Record, *, turns: bool) -> dict[str, Any]:
    """Returns a row of the file; `turns` keeps a conversation, else it is a question with accepted answers."""
    images = []
    for image in record.images:
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        images.append(stream.getvalue())
    if turns:
        return {"id": record.id, "messages": json.dumps(record.messages), "images": images}
    reference = record.reference
    return {
        "id": record.id,
        "question": record.messages[-2]["content"],
        "answers": list(reference.answers),
        "choices": json.dumps(reference.choices) if reference.choices else None,
        "group": reference.group or None,
        "images": images,
    }
