"""Whether training from rows that stream learns as well as from cached ones, and whether leaving a loader ever hangs.

- One task of the demo, written as a single parquet file sorted by answer, is learned by two workers through Ray Train, with
  several seeds: uncached, with a shuffle window far smaller than the file, and cached; held-out prompts are answered by
  all adapters. `accuracy_ratio` is the mean share that the first answer right over that of the second; beside it stand
  each seed's shares, since one seed of a small task says little.
- `hangs` of `exits` loaders, ranks of unequal speed, left at any moment: those whose reader still runs after `PATIENCE`.
"""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import PeftModel

from cluster.deepspeed_ops import build_deepspeed_ops
from cluster.local import connect
from pipeline.config import BaseModelConfig, DataConfig, ExpertConfig, RouterConfig, SourceConfig, TrainingConfig
from pipeline.data.demo.files import demo_file
from pipeline.data.encoded.packing import unpack
from pipeline.data.loading.batch_loader import BatchLoader, StepLayout
from pipeline.data.loading.preprocess import PreparedData, TaskRows, prepare
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.models.bases import load_base
from pipeline.models.generation import generate_answers
from pipeline.training.session import run_training
from pipeline.training.spec import TrainSpec

TASK, STEPS, WINDOW, SEEDS = "textures", 250, 128, 3
EXITS, AT_ONCE, PATIENCE = 50, 5, 60.0
"""Loaders that are left, pairs of them at a time, and the seconds within which a reader must have ended."""


def measure(steps: int = STEPS, exits: int = EXITS, seeds: int = SEEDS) -> dict[str, Any]:
    """Returns `accuracy_ratio`, both mean accuracies and those of each seed, `hangs` and `exits`."""
    connect()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = SourceConfig(path=str(sorted_file(folder)))
        prompts = _prepared(SourceConfig(path=f"demo://{TASK}/eval"), folder, answer=False)
        rows = {
            cache: _prepared(source, folder, answer=True, cache=cache).training_rows([TASK])
            for cache in ("none", "memory")
        }
        assert [of_cache.cached for of_cache in rows.values()] == [False, True]
        hangs = count_hangs(rows["none"], exits)
        shares = {
            cache: [_accuracy(of_cache, f"{cache}-{seed}", seed, steps, prompts, folder) for seed in range(seeds)]
            for cache, of_cache in rows.items()
        }
    streamed, cached = fmean(shares["none"]), fmean(shares["memory"])
    return {
        "accuracy_ratio": streamed / cached,
        "streamed_accuracy": streamed,
        "cached_accuracy": cached,
        "streamed_accuracies": shares["none"],
        "cached_accuracies": shares["memory"],
        "hangs": hangs,
        "exits": exits,
    }


def sorted_file(folder: Path) -> Path:
    """Writes the task's rows sorted by answer; returns the file."""
    table = pq.read_table(demo_file(f"demo://{TASK}/train", folder))
    answers = [messages[-1]["content"] for messages in table["messages"].to_pylist()]
    file = folder / "sorted.parquet"
    pq.write_table(table.take(sorted(range(len(answers)), key=answers.__getitem__)), file)
    return file


def _prepared(source: SourceConfig, folder: Path, *, answer: bool, cache: str = "memory") -> PreparedData:
    return prepare(
        {TASK: TaskRows(source)},
        DataConfig.model_validate({"cache": cache, "shuffle_rows": WINDOW}),
        base=BaseModelConfig(),
        data_folder=folder,
        quarantine=folder / "quarantine",
        answer=answer,
    )


def _accuracy(rows: TrainingRows, name: str, seed: int, steps: int, prompts: PreparedData, folder: Path) -> float:
    job = TrainSpec(
        task=TASK,
        digest=name,
        data_fingerprint=name,
        seed=seed,
        base=BaseModelConfig(),
        expert=ExpertConfig(steps=steps),
        router=RouterConfig(),
        training=TrainingConfig(workers=2, cpus_per_worker=1),
        router_stage=False,
    )
    trained = run_training(job, rows, storage=folder / "training", worker_env=build_deepspeed_ops())
    base = load_base(job.base)
    model = PeftModel.from_pretrained(base.model, trained.adapter).eval()
    torch.set_num_threads(2)
    right, count = 0, 0
    for batch in prompts.rows([TASK]).iter_batches(batch_size=64, batch_format="numpy"):
        accepted = [json.loads(text)["answers"] for text in batch["reference"]]
        answers_given = generate_answers(model, base.processor, unpack(batch), max_new_tokens=12)
        right += sum(text in answers for text, answers in zip(answers_given, accepted, strict=True))
        count += len(answers_given)
    return right / count


def count_hangs(rows: TrainingRows, exits: int) -> int:
    """Returns how many of `exits` loaders do not end."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pairs = [(number % 7, 3 * number % 5) for number in range(-(-exits // 2))]
        return sum(pool.map(lambda steps_taken: _left(rows, steps_taken), pairs))


def _left(rows: TrainingRows, steps_taken: Sequence[int]) -> int:
    """Leaves a loader for each rank after so many steps; returns how many of them still run after `PATIENCE` seconds."""
    settings: dict[str, Any] = {"layout": StepLayout(8, len(steps_taken), 2), "steps": range(10_000), "collate": list}
    loaders = [BatchLoader(rows, rank=rank, seed=steps_taken[rank], **settings) for rank in range(len(steps_taken))]
    with ExitStack() as together:
        for loader in loaders:
            together.enter_context(loader)
        for loader, steps in zip(loaders, steps_taken, strict=True):
            for _ in range(steps):
                next(loader)
    return sum(not loader.ended(PATIENCE) for loader in loaders)
