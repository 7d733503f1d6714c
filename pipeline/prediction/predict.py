"""Answers every row of a source with a pool: read, encoded, answered and written as a stream.

    source -> encoded rows -> pages -> workers -> parts
              (Ray Data)               (actors)   part-000000.parquet, ..., quarantine/, summary.json

The driver sees the places of rows and their answers, never the rows. What is in memory at a time does not depend on how many
there are: some pages of encoded rows, and the answers to the parts that are being filled.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import pyarrow as pa
import ray

from cluster.demand import Worker
from cluster.preflight import check_inference
from pipeline.config import DataConfig, PredictConfig, TrainingConfig
from pipeline.data.encoded.encoding import TaskRows
from pipeline.data.loading.preprocess import encoded_rows
from pipeline.errors import stored_file
from pipeline.evaluation.actors import PredictorActors, Work
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.pages import blocks
from pipeline.files import write_json
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.models.inference import InferenceWorkers
from pipeline.prediction.errors import PredictError
from pipeline.prediction.figures import check_bad_share, figures, is_complete
from pipeline.prediction.identity import DEMO, alone_in, check_apart, claim, identity_of
from pipeline.prediction.pages import cut, page_lengths, tags
from pipeline.prediction.parts import Parts
from pipeline.prediction.pool_source import PoolSource, check_base
from pipeline.prediction.predictor import PoolPredictor
from pipeline.provenance import now, provenance
from pipeline.routing.pool import Pool

SUMMARY = "summary.json"


class RowProgress(Protocol):
    """Who shows how many rows are done."""

    def update(self, done: int, per_second: float | None) -> None:
        """Shows the rows that are done, those of earlier runs included, and how many this run does per second."""


def predict(config: PredictConfig, pool: PoolSource, folder: Path, progress: RowProgress) -> dict[str, Any]:
    """Answers the rows into `folder`, or those that are not answered there yet; returns the summary.

    Needs a Ray that is joined. Raises PredictError where the folder holds other answers, or lies among the rows, or another
    process fills it, where none of the first rows can be used, or, when all is written, where more were set aside than `data`
    allows.
    """
    started, began = now(), monotonic()
    file, parts = folder / SUMMARY, Parts(folder)
    check_apart(config.source, folder)
    with alone_in(folder):
        claim(folder, identity_of(config, pool, folder), begun=bool(parts.done()) or file.exists())
        if file.exists() and not is_complete(parts, read_summary(file)):
            file.unlink()  # of parts that are gone, which are answered again
        if not file.exists():
            answering = Answering(config, pool, parts)
            answering.run(progress)
            speed = {"seconds": monotonic() - began, "rows_per_second": answering.per_second}
            write_json(file, provenance("predict", started) | figures(config, pool, parts, answering.read) | speed)
        summary = read_summary(file)
        check_bad_share(config.data, summary, parts)
        return summary


def read_summary(file: Path) -> dict[str, Any]:
    """Reads what `predict` wrote; raises StoredFileError where it is damaged."""
    with stored_file(file, "delete it, and it is made anew"):
        summary: dict[str, Any] = json.loads(file.read_text())
        return summary


@dataclass
class Answering:
    """Answers all rows of the parts that are not there."""

    config: PredictConfig
    pool: PoolSource
    parts: Parts
    read: int = 0
    """Rows that came from the source, earlier runs' included, counted as they arrive."""
    answered: int = 0
    """Rows that this run has answered or set aside."""
    seconds: float = 0.0
    """Time for these, from the moment that all workers were there: the first rows are read then."""

    @property
    def per_second(self) -> float | None:
        """Rows per second of this run, without the start of its workers; None before there are some."""
        return self.answered / self.seconds if self.seconds else None

    @property
    def workers(self) -> InferenceWorkers:
        """The workers of the configuration; the memory of experts is by default as registered with the pool."""
        settings = self.config.evaluation
        training = TrainingConfig(gpu=settings.gpu, cpus_per_worker=settings.cpus_per_worker)
        workers = InferenceWorkers.of(training, settings)
        return replace(workers, expert_memory=workers.expert_memory or self.pool.expert_memory)

    def run(self, progress: RowProgress) -> None:
        """Answers and writes; raises PredictError where none of the first rows can be used."""
        workers, done = self.workers, self.parts.done()
        check_inference(Worker(workers.cpus_per_worker, workers.gpus), workers.count, "evaluation.cpus_per_worker")
        first = next(part for part in range(len(done) + 1) if part not in done)
        end = self.parts.end(first - 1) if first else None
        skip = end.same_place if end else 0
        self.read = (first - 1) * self.config.rows_per_part + end.rows if end else 0
        base, pool = self.pool.base(), self.pool.pool()
        check_base(base, fingerprint(checkpoint(base)), pool, self.pool.address)  # before workers load it
        expert, column = self._told(pool)
        rows = encoded_rows(
            TaskRows(self.config.source, self.config.prompt, answered=False, task_column=column),
            "predict",
            DataConfig(**dict(self.config.data)),
            base=base,
            data_folder=self.parts.folder / DEMO,
            answer=False,
            since=(end.source, end.number) if end else None,
            ready=self.pool.base,
        )
        arguments = self.pool, workers, self.config.evaluation.max_new_tokens, expert
        with PredictorActors(PoolPredictor, *arguments, workers=workers) as actors:

            def work() -> Iterator[tuple[tuple[int, int], Work]]:
                lengths = page_lengths(self.config.rows_per_part, workers.batch_size)
                pages = cut(self._counted(blocks(actors.beside(rows)), skip), cycle(lengths), skip=skip)
                for (part, number), page in zip(tags(lengths, first), pages, strict=False):
                    if part not in done:
                        yield (part, number), Work("answer", (page.rows, *page.blocks))

            progress.update(self.read, None)
            actors.start()  # before rows are read: loading a large base takes minutes
            self._write(actors.run(work()), progress)

    def _counted(
        self, sized_blocks: Iterator[tuple[ray.ObjectRef, int]], skip: int
    ) -> Iterator[tuple[ray.ObjectRef, int]]:
        """Counts the rows of blocks on their way, without the first `skip`, which are in a part already."""
        self.read -= skip
        for block, size in sized_blocks:
            self.read += size
            yield block, size

    def _write(self, pages: Iterator[tuple[tuple[int, int], pa.Table]], progress: RowProgress) -> None:
        """Writes parts as soon as all of their answered pages are there."""
        filling: dict[int, dict[int, pa.Table]] = {}
        before, began = self.read, monotonic()
        for (part, number), page in pages:
            filling.setdefault(part, {})[number] = page
            self.answered, self.seconds = self.answered + len(page), monotonic() - began
            progress.update(before + self.answered, self.per_second)
            if sum(map(len, filling[part].values())) == self.config.rows_per_part:
                self._finish(part, filling.pop(part))
        for part in sorted(filling):  # the last one
            self._finish(part, filling[part])

    def _finish(self, part: int, pages: dict[int, pa.Table]) -> None:
        table = pa.concat_tables([pages[number] for number in sorted(pages)])
        reasons = table["reason"].to_pylist()
        if part == 0 and all(reasons) and self.config.data.max_bad_share < 1:
            told = "" if self.config.told is None else ", an expert of the pool or the column of its name with told=..."
            raise PredictError(
                f"none of the first {len(table)} rows can be answered: {reasons[0]}; name the columns with "
                f"source.columns.question=..., source.columns.images=...{told}, or correct the rows"
            )
        self.parts.write(part, table)

    def _told(self, pool: Pool) -> tuple[str | None, str | None]:
        """Returns who is told to answer all rows, and the column that names who answers each."""
        told = self.config.told
        if told is None:
            return None, None
        return (told, None) if told in (BASE, *pool.names) else (None, told)
