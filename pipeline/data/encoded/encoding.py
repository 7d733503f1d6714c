"""From a raw row to an encoded one, or to the reason why it is bad. Runs in tasks of Ray Data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import BaseModelConfig, DataConfig, SourceConfig
from pipeline.data.encoded.packing import pack, prompt_digest
from pipeline.data.errors import BadRow
from pipeline.data.rows.records import Reference
from pipeline.data.sources.raw_row import NUMBER, RawRow
from pipeline.models.bases import load_processor
from pipeline.models.encoding import Encoded, PromptError, encode

processor_of = lru_cache(maxsize=2)(load_processor)

PART, POSITION = "part", "place"
"""Columns of a raw row where several parts are read together: the part's index, and the row's index in the part."""

PROMPT_COLUMNS = 2
"""Version of the columns of prompts; version 1 had neither number nor digest."""

_AT_ONCE = 32 << 20
"""Bytes of encoded images per batch; bounds memory however many tiles an image has."""


@dataclass(frozen=True)
class TaskRows:
    """Rows of a task for training or evaluation: their source and the template around their questions."""

    source: SourceConfig
    prompt: str = "{question}"
    key: str = ""
    """Digest of all that the encoded rows depend on; needed where they are kept on disk."""
    metric: str | None = None
    """Metric of the answers; rows that it cannot score are set aside."""
    answered: bool = True
    """Whether rows must have answers."""
    task_column: str | None = None
    """Column that names each row's task; encoded rows have it as `task`."""


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a part."""

    part: TaskRows
    task: str
    """The task's name."""
    base: BaseModelConfig
    data: DataConfig
    answer: bool
    """Whether rows hold the answer (training) or only the prompt."""

    def row(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the columns of an encoded row; a bad row has a `reason`, no exception is raised.

        A prompt also has its number in its file and its digest.
        """
        raw = RawRow.of(columns)
        row: dict[str, Any] = {
            "column": self.task,
            "id": raw.id(self.part.source),
            "question": "",
            "reference": "",
        }
        row |= {"reason": "", "excerpt": "", "source": raw.path, "rows": 1, "lost": ""}
        if not self.answer:
            row |= {"prompt": "", NUMBER: raw.number}
        if self.part.task_column is not None:
            row |= {"task": ""}
        if POSITION in columns:
            row |= {POSITION: columns[POSITION]}
        try:
            record = raw.record(
                self.part.source, self.part.prompt, max_pixels=self.data.max_pixels, answered=self.part.answered
            )
            if self.part.task_column is not None:
                row |= {"task": raw.task(self.part.task_column)}
            encoded = encode(processor_of(self.base), record.messages, record.images, answer=self.answer)
            check_metric(record.reference, self.part.metric)
            if len(encoded.input_ids) > self.data.max_tokens:
                raise BadRow(f"{len(encoded.input_ids)} tokens, data.max_tokens allows {self.data.max_tokens}")
            row |= {"question": record.question, "reference": record.reference.model_dump_json()}
        except (BadRow, PromptError) as error:
            encoded = _NOTHING
            row |= {"reason": str(error), "excerpt": raw.excerpt, **raw.extent}
        packed = pack(encoded)
        if not self.answer and not row["reason"]:
            row["prompt"] = prompt_digest(packed)
        return row | packed


def encode_batch(
    batch: pa.Table, *, encoders: Sequence[Encoder], ready: Callable[[], object] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Encodes a batch of raw rows, each by the encoder of its part, after calling `ready`.

    Yields after every `_AT_ONCE` bytes: twelve tiles of one image are 29 MB.
    """
    ready()
    rows: list[dict[str, Any]] = []
    size = 0
    for raw in batch.to_pylist():
        rows.append(encoders[raw.get(PART, 0)].row(raw))
        size += len(rows[-1]["arrays"])
        if size >= _AT_ONCE:
            yield _columns(rows)
            rows, size = [], 0
    if rows:
        yield _columns(rows)


MIN_ANSWERS = 4
"""Fewest human answers for VQA accuracy: with fewer not even a unanimous answer scores 1."""


def check_metric(reference: Reference, metric: str | None) -> None:
    """Raises BadRow where a metric cannot score answers against this reference."""
    if metric == "mmbench" and reference.answers[0] not in reference.choices:
        options = ", ".join(reference.choices) or "none"
        raise BadRow(
            f"metric mmbench: the answer {reference.answers[0]!r} is not an option's letter (options: {options})"
        )
    if metric == "vqa_accuracy" and len(reference.answers) < MIN_ANSWERS:
        raise BadRow(
            f"metric vqa_accuracy needs at least {MIN_ANSWERS} answers of people, found {len(reference.answers)}"
        )


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row[key] for row in rows] for key in rows[0]}


_NOTHING = Encoded(np.zeros(0, np.int64), np.zeros(0, np.int64))
