"""Prompt tables of tasks: loaded, or read and recorded once for all users of a folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pipeline.config import digest
from pipeline.data.errors import StreamError
from pipeline.data.loading.prompts import PromptSource
from pipeline.data.rows.quarantine import SetAside
from pipeline.data.sources.files import resolve
from pipeline.evaluation.actors import PredictorActors, Work
from pipeline.evaluation.answers import Pull
from pipeline.evaluation.pages import blocks
from pipeline.evaluation.prompts import EvalTask, PromptTable
from pipeline.routing.features import FEATURE_RULE


class PromptTables:
    """Prompt tables in `folder`.

    Bad rows are written below `quarantine` and reported to `on_set_aside`, once per process. `pull` brings a table
    that lies elsewhere.
    """

    def __init__(
        self,
        source: PromptSource,
        folder: Path,
        *,
        quarantine: Path,
        on_set_aside: Callable[[str, SetAside], None],
        pull: Pull,
    ) -> None:
        self._source, self._folder, self._pull = source, folder, pull
        self._quarantine, self._on_set_aside = quarantine, on_set_aside
        self._tables: dict[str, PromptTable] = {}

    def of(self, tasks: Sequence[EvalTask], width: int, actors: PredictorActors) -> list[PromptTable]:
        """Returns the prompt tables of these tasks with features of `width`; missing ones are recorded now.

        Raises StreamError where there are too many bad rows.
        """
        names = {name_of(task, width): task for task in tasks}
        new = {name: task for name, task in names.items() if name not in self._tables}
        stored = {name: table for name, task in new.items() if (table := self._stored(name, task)) is not None}
        unread = {name: task for name, task in new.items() if name not in stored}
        compute_image_embeds(self._source, list(unread.values()), actors)
        recorded = self._record(unread, width, actors)
        for name, task in new.items():
            table = recorded[name] if name in recorded else stored[name]
            if aside := table.set_aside(task, self._quarantine / f"{task.name}.jsonl", self._source.data):
                self._on_set_aside(task.name, aside)
            elif name in recorded:  # not with bad rows: a missing image may be there the next time
                table.save(self._file(name))
            self._tables[name] = table
        return [self._tables[name] for name in names]

    def _stored(self, name: str, task: EvalTask) -> PromptTable | None:
        """Returns a recorded table; None if there is none, or if its files were moved: prompts are read from them again.

        A table whose files are gone stays: perhaps all of its prompts are answered. With cached image embeddings prompts come
        from the cache, which names the same files.
        """
        self._pull(self._folder, self._file(name).name)
        if not self._file(name).exists():
            return None
        table = PromptTable.load(self._file(name))
        if self._source.data.vision_cache == "off":
            with suppress(StreamError):
                _, files, _ = resolve(task.part.source, self._source.data_folder)
                if not table.files <= {file.path for file in files}:
                    return None
        return table

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"

    def _record(self, unread: Mapping[str, EvalTask], width: int, actors: PredictorActors) -> dict[str, PromptTable]:
        """Reads the prompts of tasks by table name, and records their features."""

        def pieces() -> Iterator[tuple[tuple[str, int], Work]]:
            for name, task in unread.items():
                rows = actors.beside(self._source.rows(task.name, task.part))
                for number, (block, _) in enumerate(blocks(rows)):
                    yield (name, number), Work("record", (width, block))

        parts = dict(sorted(actors.run(pieces())))
        return {
            name: PromptTable(pa.concat_tables([p for (of, _), p in parts.items() if of == name])) for name in unread
        }


def compute_image_embeds(source: PromptSource, tasks: Sequence[EvalTask], actors: PredictorActors) -> None:
    """Computes missing image embeddings, on GPUs that the actors free for it."""
    for task in tasks:
        if not source.has_image_embeds(task.name, task.part):
            actors.close()
            actors.make_room()
            source.compute_image_embeds(task.name, task.part)


def name_of(task: EvalTask, width: int) -> str:
    """Returns the name of a task's table, with a digest of all that it depends on."""
    return f"{task.name}-{digest(task.part.key, width, FEATURE_RULE)}"
