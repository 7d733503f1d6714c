"""Answering in bulk against a plain loop over the routed model: the same rows, batches and threads.

python -m jobs.benchmark predict
"""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import ray
import torch
import typer

from cluster.local import connect
from jobs.benchmark.tools.synthetic_experts import BASE, FEATURES, synthetic_expert
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import PredictConfig, RouterConfig
from pipeline.data.sources.reader import first_records
from pipeline.files import write_json
from pipeline.models.answering import routed_answers
from pipeline.models.bases import load_processor
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.models.encoding import encode
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.prediction.pool_source import PoolFolder
from pipeline.prediction.predict import predict as predict_rows
from pipeline.provenance import now, provenance
from pipeline.routing import Pool, RoutedModel

TARGET = 0.9
"""Least part of the plain loop's rows per second."""

EXPERTS = 3

WARM_UP = 4
"""Batches that do not count: processes that read and encode start with the first rows."""


class _Clock:
    """Times how many rows are done, from the end of the warm-up on."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self._first: tuple[int, float] | None = None
        self._last = 0, 0.0

    def update(self, done: int, per_second: float | None = None) -> None:
        """Notes the rows that are done."""
        self._last = done, perf_counter()
        if self._first is None and done >= self._warm_up:
            self._first = self._last

    @property
    def per_second(self) -> float:
        """Rows per second."""
        assert self._first is not None, "more rows than the warm-up takes"
        return (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])


def predict(
    rows: Annotated[int, typer.Option(help="Rows per round, of the demo's base prompts.", min=512)] = 2048,
    rounds: Annotated[int, typer.Option(help="Rounds of plain loop and `predict`, in turn; medians count.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch, in the loop and in the worker.", min=1)] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs"),
) -> None:
    """Measure the rows per second of `pointsman predict` with one worker, and of a plain loop.

    Both read, decode, encode and answer the same rows in batches of 64. The first four batches do not count: neither the start
    of Ray's processes nor loading the base is measured. `predict` encodes beside the worker, in other processes, the loop in
    between.
    """
    with user_errors():
        terminal, started = Terminal(), now()
        folder = (output / "benchmark-predict").resolve()
        shutil.rmtree(folder, ignore_errors=True)
        source = PoolFolder.of(_pool().save(folder / "pool"), BASE)
        config = PredictConfig.model_validate({
            "source": {"path": "demo://general/train", "limit": rows},
            "evaluation": {"cpus_per_worker": threads, "max_new_tokens": 12},
        })  # fmt: skip
        connect()
        plain: list[float] = []
        ours: list[float] = []
        for number in range(rounds):
            terminal.log(f"round {number + 1}/{rounds}")
            with terminal.working("plain loop"):
                # In a process of Ray's, as the worker is: these run at a lower priority, which shows on a busy machine.
                loop = ray.remote(num_cpus=threads, max_retries=0)(_plain_loop)
                plain.append(ray.get(loop.remote(config, source, folder / "data")))
            with terminal.working("predict"):
                clock = _Clock(WARM_UP * config.evaluation.batch_size)
                predict_rows(config, source, folder / f"round-{number}", clock)
                ours.append(clock.per_second)
        ratio = median(ours) / median(plain)
        results: dict[str, Any] = {
            "rows": rows,
            "batch_size": config.evaluation.batch_size,
            "warm_up_batches": WARM_UP,
            "plain_rows_per_second": plain,
            "predict_rows_per_second": ours,
            "ratio": ratio,
        }
        write_json(folder / "summary.json", provenance("benchmark-predict", started) | {"predict": results})
        body = [
            ["plain loop", f"{median(plain):.1f}", "1.00", ""],
            ["predict", f"{median(ours):.1f}", f"{ratio:.2f}", "yes" if ratio >= TARGET else "NO"],
        ]
        terminal.show(table(f"{rows} rows", ["", "rows/s (median)", "throughput", f">= {TARGET}"], body))
        terminal.log(f"summary    {folder / 'summary.json'}")


def _pool() -> Pool:
    base_fingerprint = fingerprint(checkpoint(BASE))
    experts = [synthetic_expert(f"task_{number}", number, base_fingerprint) for number in range(EXPERTS)]
    return Pool(BASE.label, base_fingerprint, RouterConfig(feature_width=FEATURES), experts)


def _plain_loop(config: PredictConfig, source: PoolFolder, data: Path) -> float:
    """Returns the rows per second of a loop that reads, encodes and answers batch by batch, after the warm-up."""
    settings, limit = config.evaluation, config.source.limit or 0
    before = torch.get_num_threads()
    try:
        frozen = FrozenBase(BASE, InferenceWorkers(cpus_per_worker=settings.cpus_per_worker))
        routed, processor = RoutedModel(frozen.base.model, source.pool()), load_processor(BASE)

        def encoded() -> Iterator[Any]:
            for record in first_records(config.source, data, config.prompt, limit):
                yield encode(processor, record.messages, record.images, answer=False)

        clock, done, prompts = _Clock(WARM_UP * settings.batch_size), 0, encoded()
        while page := list(islice(prompts, settings.batch_size)):
            routed_answers(frozen, routed, page, settings.max_new_tokens)
            done += len(page)
            clock.update(done)
        return clock.per_second
    finally:
        torch.set_num_threads(before)
