"""From raw rows to encoded rows, on Ray Data: validate, decode, tokenize; set bad rows aside.

One task of Ray Data does all three for a batch, outside the training process. Small sources are kept encoded in Ray's
object store over the epochs; large ones stay encoded bytes until the moment they are needed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import TaskPoolStrategy
from ray.data.expressions import col

from pipeline.config import SourceConfig, StreamConfig
from pipeline.models.processors import load_processor
from pipeline.models.prompts import Encoded, encode
from pipeline.streams.records import BadRow
from pipeline.streams.sources import PATH, StreamError, count_rows, excerpt, read, record_of, row_id

_processor = lru_cache(maxsize=2)(load_processor)


@dataclass(frozen=True)
class Part:
    """A task's rows of one kind: where they come from and the template around their questions."""

    source: SourceConfig
    prompt: str = "{question}"


@dataclass(frozen=True)
class Prepared:
    """Sources ready for use."""

    parts: Mapping[str, ray.data.Dataset]
    """Encoded rows by task (see `unpack`), lazily: with `id`, `column` (the task), `question` and `answers` (JSON)."""
    cache: ray.data.Dataset | None
    """All good rows in the object store, where they fit."""
    counts: Mapping[str, int]
    """Good rows by task."""
    quarantined: Mapping[str, int]
    """Rows set aside, by task."""

    def rows(self, names: Sequence[str]) -> ray.data.Dataset:
        """Returns the good rows of these tasks."""
        if self.cache is None:
            return union([self.parts[name] for name in names]).filter(expr=_GOOD)
        if set(names) == set(self.parts):
            return self.cache
        return self.cache.filter(expr=col("column").is_in(list(names)))


_GOOD = col("reason") == ""
_NOTES = ["column", "id", "reason", "excerpt", "source"]


def union(datasets: Sequence[ray.data.Dataset]) -> ray.data.Dataset:
    """Returns the rows of all datasets, in their order."""
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def prepare(
    parts: Mapping[str, Part],
    stream: StreamConfig,
    *,
    processor: Path,
    data_folder: Path,
    quarantine: Path,
    answer: bool,
) -> Prepared:
    """Validates and encodes the rows of one or more tasks in a single pass.

    Rows that cannot be used go to `quarantine` (`<task>.jsonl` in that folder) with id and reason. `processor` is the
    base's checkpoint folder; `answer` says whether rows are to be learned or only asked. Raises StreamError when a task's
    share of bad rows exceeds `stream.max_bad_share`, or no row is left.
    """
    encoded = {}
    for name, part in parts.items():
        work = partial(
            encode_batch,
            part=part,
            column=name,
            processor=str(processor),
            max_tokens=stream.max_tokens,
            answer=answer,
        )
        encoded[name] = read(part.source, data_folder).map_batches(
            work, batch_size=64, batch_format="numpy", compute=TaskPoolStrategy(stream.readers)
        )
    rows = union(list(encoded.values()))
    cached = stream.cache == "memory" or (stream.cache == "auto" and _fits(parts, data_folder, processor))
    if cached:
        rows = rows.materialize()
    totals: Counter[str] = Counter()
    bad: dict[str, list[dict[str, str]]] = {name: [] for name in parts}
    for batch in rows.select_columns(_NOTES).iter_batches(batch_size=None, batch_format="numpy"):
        totals.update(batch["column"])
        for i in np.flatnonzero(batch["reason"] != ""):
            bad[batch["column"][i]].append({key: str(batch[key][i]) for key in _NOTES[1:]})
    for name, part in parts.items():
        _set_aside(name, part, bad[name], totals[name], quarantine / f"{name}.jsonl", stream.max_bad_share)
    if cached and any(bad.values()):
        rows = rows.filter(expr=_GOOD).materialize()
    return Prepared(
        parts=encoded,
        cache=rows if cached else None,
        counts={name: totals[name] - len(bad[name]) for name in parts},
        quarantined={name: len(bad[name]) for name in parts},
    )


def _set_aside(name: str, part: Part, bad: list[dict[str, str]], total: int, file: Path, allowed: float) -> None:
    """Writes a task's bad rows to `file`; raises StreamError where they are too many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if bad:
        file.write_text("".join(json.dumps(row) + "\n" for row in bad))
    if total == len(bad) or len(bad) > allowed * total:
        reasons = "; ".join(f"{row['id'] or 'a row'}: {row['reason']}" for row in bad[:3]) or "the files are empty"
        raise StreamError(
            f"task {name!r}: {len(bad)} of {total} rows of {part.source.path} cannot be used (stream.max_bad_share "
            f"allows {allowed:.0%}). First: {reasons}. All of them with reasons: {file}"
        )


def _fits(parts: Mapping[str, Part], data_folder: Path, processor: Path) -> bool:
    """Whether all rows, encoded at their largest, take at most a quarter of the cluster's object store."""
    images = _processor(str(processor)).image_processor
    tiles = images.max_patches + 1 if images.max_patches > 1 else 1  # the crops and the thumbnail
    row_bytes = tiles * 3 * images.size["height"] * images.size["width"] * 4
    store = ray.cluster_resources().get("object_store_memory", 0)
    return sum(count_rows(part.source, data_folder) for part in parts.values()) * row_bytes <= store / 4


def encode_batch(
    batch: Mapping[str, np.ndarray],
    *,
    part: Part,
    column: str,
    processor: str,
    max_tokens: int,
    answer: bool,
) -> dict[str, Any]:
    """Encodes a batch of raw rows; a row that fails gets a `reason` instead of an exception.

    Rows differ in shape, so tensors travel as bytes: `input_ids` and `labels` int64, `pixel_values` float32.
    """
    loaded = _processor(processor)
    names = list(batch)
    out: list[dict[str, Any]] = []
    for values in zip(*(batch[key] for key in names), strict=True):
        raw = {key: plain(value) for key, value in zip(names, values, strict=True)}
        row = {"column": column, "id": row_id(raw, part.source), "question": "", "answers": "[]"}
        row |= {"reason": "", "excerpt": "", "source": str(raw.get(PATH, ""))}
        try:
            record = record_of(raw, part.source, part.prompt)
            encoded = encode(loaded, record.messages, record.images, answer=answer)
            if len(encoded.input_ids) > max_tokens:
                raise BadRow(f"{len(encoded.input_ids)} tokens, stream.max_tokens allows {max_tokens}")
            row |= {"question": record.question, "answers": json.dumps(record.answers)}
        except BadRow as error:
            encoded = _NOTHING
            row |= {"reason": str(error), "excerpt": excerpt(raw)}
        out.append(row | pack(encoded))
    return {key: [row[key] for row in out] for key in out[0]} if out else {}


_NOTHING = Encoded(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3, 0, 0), np.float32))


def plain(value: Any) -> Any:
    """Turns numpy values, as Ray Data hands them out, back into plain Python."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.item() if isinstance(value, np.generic) else value


PACKED = ("input_ids", "labels", "pixel_values", "pixel_shape")
"""Columns of an encoded row."""


def pack(encoded: Encoded) -> dict[str, Any]:
    """Returns an encoded row as columns."""
    return {
        "input_ids": encoded.input_ids.tobytes(),
        "labels": encoded.labels.tobytes(),
        "pixel_values": encoded.pixel_values.tobytes(),
        "pixel_shape": np.asarray(encoded.pixel_values.shape, dtype=np.int64).tobytes(),
    }


def unpack(batch: Mapping[str, Any]) -> list[Encoded]:
    """Reads encoded rows from a batch of columns, without copying the pixels."""
    return [
        Encoded(
            np.frombuffer(ids, np.int64),
            np.frombuffer(labels, np.int64),
            np.frombuffer(pixels, np.float32).reshape(tuple(np.frombuffer(shape, np.int64))),
        )
        for ids, labels, pixels, shape in zip(*(batch[name] for name in PACKED), strict=True)
    ]
