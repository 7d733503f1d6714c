"""From raw rows to encoded rows, on Ray Data: validate, decode, tokenize; set bad rows aside.

One task of Ray Data does all three for a batch, outside the training process. Small sources are kept encoded in Ray's
object store over the epochs; large ones stay encoded bytes until the moment they are needed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import TaskPoolStrategy
from ray.data.expressions import col

from pipeline.config import BaseModelConfig, DataConfig, SourceConfig
from pipeline.models.bases import load_processor
from pipeline.models.inference import InferenceWorkers
from pipeline.models.prompts import Encoded, PromptError, encode
from pipeline.streams.packing import pack
from pipeline.streams.quarantine import NOTES, SetAside, set_aside
from pipeline.streams.records import BadRow, Reference
from pipeline.streams.sources import PATH, count_rows, excerpt, extent, first_records, read, record_of, row_id
from pipeline.streams.training_rows import TrainingRows
from pipeline.streams.vision import with_features

_processor = lru_cache(maxsize=2)(load_processor)

_PIECE = 32 << 20
"""Bytes of encoded images after which a batch is handed on; keeps memory flat, however many tiles an image has."""

_SAMPLE = 4
"""Rows a part that are encoded to guess how much room all of them will take."""


@dataclass(frozen=True)
class Part:
    """A task's rows of one kind: where they come from and the template around their questions."""

    source: SourceConfig
    prompt: str = "{question}"
    key: str = ""
    """Names what its encoded rows depend on; needed where they are kept on disk."""
    metric: str | None = None
    """What its answers will be scored by; rows that this metric cannot score are set aside."""


@dataclass(frozen=True)
class Prepared:
    """Sources ready for use."""

    parts: Mapping[str, ray.data.Dataset]
    """Encoded rows by task (see `packing`), lazily: with `id`, `column` (the task), `question` and `reference` (JSON)."""
    cache: ray.data.Dataset | None
    """All good rows in the object store, where they fit."""
    counts: Mapping[str, int]
    """Good rows by task."""
    aside: Mapping[str, SetAside]
    """Rows and files set aside, by task."""

    def rows(self, names: Sequence[str]) -> ray.data.Dataset:
        """Returns the good rows of these tasks."""
        if self.cache is None:
            return union([self.parts[name] for name in names]).filter(expr=_GOOD)
        if set(names) == set(self.parts):
            return self.cache
        return self.cache.filter(expr=col("column").is_in(list(names)))

    def training_rows(self, names: Sequence[str]) -> TrainingRows:
        """Returns the good rows of these tasks as training workers read them."""
        blocks = self.rows(names).materialize().to_arrow_refs()
        return TrainingRows(sum(self.counts[name] for name in names), tuple(blocks))


_GOOD = col("reason") == ""
_NOTES = ["column", *NOTES]


def union(datasets: Sequence[ray.data.Dataset]) -> ray.data.Dataset:
    """Returns the rows of all datasets, in their order."""
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def prepare(
    parts: Mapping[str, Part],
    data: DataConfig,
    *,
    base: BaseModelConfig,
    data_folder: Path,
    quarantine: Path,
    answer: bool,
    features: Path | None = None,
    workers: InferenceWorkers | None = None,
) -> Prepared:
    """Validates and encodes the rows of one or more tasks in a single pass.

    Rows that cannot be used go to `quarantine` (`<task>.jsonl` in that folder) with id and reason. `answer` says whether
    rows are to be learned or only asked. With `data.vision_cache` what the vision tower says of the images is kept below
    the folder `features`, under each part's key, computed by `workers`. Raises StreamError when a task's share of bad
    rows exceeds `data.max_bad_share`, more files are lost than `data.max_lost_files`, or no row is left.
    """
    encoded = {}
    for name, part in parts.items():
        rows = encoded_rows(part, name, data, base=base, data_folder=data_folder, answer=answer)
        if data.vision_cache == "features":
            assert features is not None, "whoever asks for features says where they go"
            rows = with_features(rows, base, features / f"{name}-{part.key}", workers=workers or InferenceWorkers())
        encoded[name] = rows
    rows = union(list(encoded.values()))
    cached = data.cache == "memory" or (data.cache == "auto" and _fits(parts, data, base, data_folder))
    if cached:
        rows = rows.materialize()
    totals: Counter[str] = Counter()
    bad: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    for batch in rows.select_columns(_NOTES).iter_batches(batch_size=None, batch_format="numpy"):
        totals.update(batch["column"])
        for i in np.flatnonzero(batch["reason"] != ""):
            bad[batch["column"][i]].append(
                {key: batch[key][i].item() if key == "rows" else str(batch[key][i]) for key in NOTES}
            )
    good = {name: totals[name] - len(bad[name]) for name in parts}
    aside = {
        name: set_aside(name, part.source, bad[name], good[name], quarantine / f"{name}.jsonl", data)
        for name, part in parts.items()
    }
    if cached and any(bad.values()):
        rows = rows.filter(expr=_GOOD).materialize()
    return Prepared(
        parts=encoded,
        cache=rows if cached else None,
        counts=good,
        aside=aside,
    )


def encoded_rows(
    part: Part, name: str, data: DataConfig, *, base: BaseModelConfig, data_folder: Path, answer: bool
) -> ray.data.Dataset:
    """Returns a part's rows, encoded when they are read; bad ones have a `reason`."""
    work = partial(encode_batch, part=part, column=name, base=base, data=data, answer=answer)
    return read(part.source, data_folder, readers=data.readers).map_batches(
        work, batch_size=64, batch_format="pyarrow", compute=TaskPoolStrategy(data.readers)
    )


def _fits(parts: Mapping[str, Part], data: DataConfig, base: BaseModelConfig, data_folder: Path) -> bool:
    """Whether all rows take at most a quarter of the smallest object store, going by the first ones of each part.

    Every node on which a worker trains comes to hold all of them.
    """
    processor, total = _processor(base), 0.0
    for part in parts.values():
        sizes = []
        for record in first_records(part.source, data_folder, part.prompt, _SAMPLE):
            with suppress(PromptError):
                row = encode(processor, record.messages, record.images, answer=False)
                sizes.append(sum(array.nbytes for array in row.images.values()) + row.input_ids.nbytes)
        total += max(sizes, default=0) * count_rows(part.source, data_folder)
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return total <= min(stores) / 4


def encode_batch(
    batch: pa.Table, *, part: Part, column: str, base: BaseModelConfig, data: DataConfig, answer: bool
) -> Iterator[dict[str, Any]]:
    """Encodes a batch of raw rows; a row that fails gets a `reason` instead of an exception.

    Yields as soon as `_PIECE` bytes have come together: twelve tiles of one image are 29 MB.
    """
    processor = _processor(base)
    out: list[dict[str, Any]] = []
    size = 0
    for raw in batch.to_pylist():
        row: dict[str, Any] = {"column": column, "id": row_id(raw, part.source), "question": "", "reference": ""}
        row |= {"reason": "", "excerpt": "", "source": str(raw.get(PATH, "")), "rows": 1, "lost": ""}
        try:
            record = record_of(raw, part.source, part.prompt, max_pixels=data.max_pixels)
            encoded = encode(processor, record.messages, record.images, answer=answer)
            check_metric(record.reference, part.metric)
            if len(encoded.input_ids) > data.max_tokens:
                raise BadRow(f"{len(encoded.input_ids)} tokens, data.max_tokens allows {data.max_tokens}")
            row |= {"question": record.question, "reference": record.reference.model_dump_json()}
        except (BadRow, PromptError) as error:
            encoded = _NOTHING
            row |= {"reason": str(error), "excerpt": excerpt(raw), **extent(raw)}
        out.append(row | pack(encoded))
        size += len(out[-1]["arrays"])
        if size >= _PIECE:
            yield _columns(out)
            out, size = [], 0
    if out:
        yield _columns(out)


VOTES = 4
"""Answers of people below which VQA accuracy has no meaning: not even a unanimous one could reach 1."""


def check_metric(reference: Reference, metric: str | None) -> None:
    """Raises BadRow where a metric cannot score answers against this reference."""
    if metric == "mmbench" and reference.answers[0] not in reference.choices:
        options = ", ".join(reference.choices) or "none"
        raise BadRow(
            f"metric mmbench: the answer {reference.answers[0]!r} is not an option's letter (options: {options})"
        )
    if metric == "vqa_accuracy" and len(reference.answers) < VOTES:
        raise BadRow(f"metric vqa_accuracy needs at least {VOTES} answers of people, found {len(reference.answers)}")


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row[key] for row in rows] for key in rows[0]}


_NOTHING = Encoded(np.zeros(0, np.int64), np.zeros(0, np.int64))
