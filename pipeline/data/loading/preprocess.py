"""From raw rows to encoded rows, on Ray Data: validate, decode, tokenize; set bad rows aside.

One task of Ray Data does all three for a batch, outside the training process. Small sources are kept encoded in Ray's
object store over the epochs; large ones are streamed in pieces, shuffled anew for every epoch.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import TaskPoolStrategy
from ray.data.expressions import col

from pipeline.config import BaseModelConfig, DataConfig
from pipeline.data.encoded.encoding import POSITION, Encoder, encode_batch, processor_of
from pipeline.data.encoded.encoding import TaskRows as TaskRows
from pipeline.data.encoded.image_embeds import with_image_embeds
from pipeline.data.loading.streamed_part import StreamedPart, streamed_image_embeds, streamed_part
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.data.rows.quarantine import NOTES, SetAside, set_aside
from pipeline.data.sources.reader import Place, count_rows, first_records, read
from pipeline.models.encoding import PromptError, encode
from pipeline.models.inference import InferenceWorkers
from pipeline.storage.mirror import Folder, Mirror

_SAMPLE = 4
"""Rows per part that are encoded to estimate the size of all."""


@dataclass(frozen=True)
class PreparedData:
    """Sources ready for use."""

    parts: Mapping[str, ray.data.Dataset]
    """Encoded rows by task (see `packing`), lazily: with `id`, `column` (the task), `question` and `reference` (JSON)."""
    cache: ray.data.Dataset | None
    """All good rows in the object store, where they fit."""
    counts: Mapping[str, int]
    """Good rows by task."""
    aside: Mapping[str, SetAside]
    """Rows and files set aside, by task."""
    streamed: Mapping[str, StreamedPart] = field(default_factory=dict)
    """Training rows that do not fit into the object store, by task."""

    def rows(self, names: Sequence[str]) -> ray.data.Dataset:
        """Returns the good rows of these tasks."""
        if self.cache is None:
            return union([self.parts[name] for name in names]).filter(expr=_GOOD)
        if set(names) == set(self.parts):
            return self.cache
        return self.cache.filter(expr=col("column").is_in(list(names)))

    def training_rows(self, names: Sequence[str]) -> TrainingRows:
        """Returns the good rows of these tasks for training workers; needs rows that were prepared with `answer`."""
        count = sum(self.counts[name] for name in names)
        if self.cache is None:
            return TrainingRows(count, parts=tuple(self.streamed[name] for name in names))
        blocks = self.rows(names).materialize().to_arrow_refs()
        return TrainingRows(count, tuple(blocks))


_GOOD = col("reason") == ""
_NOTES = ["column", *NOTES]


def union(datasets: Sequence[ray.data.Dataset]) -> ray.data.Dataset:
    """Returns the rows of all datasets, in their order."""
    return datasets[0].union(*datasets[1:]) if len(datasets) > 1 else datasets[0]


def prepare(
    parts: Mapping[str, TaskRows],
    data: DataConfig,
    *,
    base: BaseModelConfig,
    data_folder: Folder,
    quarantine: Path,
    answer: bool,
    embeds_folder: Folder | None = None,
    workers: InferenceWorkers | None = None,
) -> PreparedData:
    """Validates and encodes the rows of one or more tasks in a single pass.

    Rows that cannot be used go to `quarantine` (`<task>.jsonl` in that folder) with id and reason. With
    `answer` rows hold their answers (training), else only prompts. With `data.vision_cache` image embeddings are computed by
    `workers` and kept in `embeds_folder`, under each part's key. Raises StreamError when a task's share of bad
    rows exceeds `data.max_bad_share`, more files are lost than `data.max_lost_files`, or no row is left.
    """
    wishes = {part.source.cache or data.cache for part in parts.values()} if answer else {data.cache}
    fits = wishes == {"memory"} or ("none" not in wishes and _fits(parts, data, base, data_folder))
    streaming = answer and not fits
    streamed: dict[str, StreamedPart] = {}
    encoded = {}
    for name, part in parts.items():
        encoder, folder = Encoder(part, name, base, data, answer), None
        rows = encoded_rows(part, name, data, base=base, data_folder=data_folder, answer=answer)
        if data.vision_cache == "features":
            assert embeds_folder is not None, "image embeddings need a folder"
            folder = Mirror.of(embeds_folder) / f"{name}-{part.key}"
            rows = with_image_embeds(rows, base, folder, workers=workers or InferenceWorkers())
        if streaming:
            streamed[name] = streamed_image_embeds(encoder, folder) if folder else streamed_part(encoder, data_folder)
            rows = streamed[name].in_order()
        encoded[name] = rows
    rows = union(list(encoded.values()))
    if fits:
        rows = rows.materialize()
    totals: Counter[str] = Counter()
    bad: dict[str, list[dict[str, Any]]] = {name: [] for name in parts}
    bad_positions: dict[str, list[int]] = {name: [] for name in parts}
    noted = [*_NOTES, POSITION] if streaming else _NOTES
    for batch in rows.select_columns(noted).iter_batches(batch_size=None, batch_format="numpy"):
        totals.update(batch["column"])
        for i in np.flatnonzero(batch["reason"] != ""):
            bad[batch["column"][i]].append(
                {key: batch[key][i].item() if key == "rows" else str(batch[key][i]) for key in NOTES}
            )
            if streaming:
                bad_positions[batch["column"][i]].append(int(batch[POSITION][i]))
    good = {name: totals[name] - len(bad[name]) for name in parts}
    aside = {
        name: set_aside(name, part.source, bad[name], good[name], quarantine / f"{name}.jsonl", data)
        for name, part in parts.items()
    }
    if fits and any(bad.values()):
        rows = rows.filter(expr=_GOOD).materialize()
    return PreparedData(
        parts=encoded,
        cache=rows if fits else None,
        streamed={
            name: part.without(np.sort(np.array(bad_positions[name], np.int64))) for name, part in streamed.items()
        },
        counts=good,
        aside=aside,
    )


def encoded_rows(
    part: TaskRows,
    name: str,
    data: DataConfig,
    *,
    base: BaseModelConfig,
    data_folder: Folder,
    answer: bool,
    chosen: Any = None,
    since: Place | None = None,
    ready: Callable[[], object] = lambda: None,
) -> ray.data.Dataset:
    """Returns a part's rows, encoded when they are read; bad ones have a `reason`.

    `chosen`, an expression on raw rows (see `sources`), selects the rows to encode, and `since` leaves those before a place
    out; by default all. `ready` is called where rows are encoded, before each batch: it may bring the base's files there.
    """
    also = () if part.task_column is None else (part.task_column,)
    raw = read(part.source, data_folder, readers=data.num_readers, also=also, since=since, answered=part.answered)
    work = partial(encode_batch, encoders=[Encoder(part, name, base, data, answer)], ready=ready)
    return (raw if chosen is None else raw.filter(expr=chosen)).map_batches(
        work, batch_size=64, batch_format="pyarrow", compute=TaskPoolStrategy(data.num_readers)
    )


def _fits(parts: Mapping[str, TaskRows], data: DataConfig, base: BaseModelConfig, data_folder: Folder) -> bool:
    """Whether all rows take at most a quarter of the smallest object store, estimated from the first rows of each part.

    Every node with a training worker holds all of them.
    """
    processor, total = processor_of(base), 0.0
    for part in parts.values():
        sizes = []
        for record in first_records(part.source, data_folder, part.prompt, _SAMPLE):
            with suppress(PromptError):
                row = encode(processor, record.messages, record.images, answer=False)
                sizes.append(sum(array.nbytes for array in row.images.values()) + row.input_ids.nbytes)
        total += max(sizes, default=0) * count_rows(part.source, data_folder)
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return total <= min(stores) / 4
