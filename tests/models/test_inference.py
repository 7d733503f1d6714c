"""One frozen base for all inference: batches by tokens, logits at last tokens only, devices as configured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import BaseModelConfig, EvaluationConfig, TrainingConfig
from pipeline.models.inference import FrozenBase, InferenceWorkers, batches
from tests.helpers import prompts

WORKERS = InferenceWorkers(cpus_per_worker=1)


@contextmanager
def counted_logits(model: Any) -> Iterator[list[int]]:
    """Counts the tokens at which the head computes logits, pass by pass."""
    seen: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def test_batches_are_bounded_by_tokens_and_rows() -> None:
    lengths = [5, 100, 7, 30, 40, 6]
    groups = batches(lengths, rows=3, tokens=80)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert groups == [[1], [4, 3], [2, 5, 0]]  # one alone is too long, and still answered
    for group in groups[1:]:
        assert len(group) * max(lengths[i] for i in group) <= 80
    assert batches([], rows=3, tokens=80) == []


def test_reading_prompts_computes_one_logit_a_row(tiny_folder: Path) -> None:
    frozen = FrozenBase(BaseModelConfig(path=str(tiny_folder)), WORKERS)
    rows = prompts(frozen.base.processor, "describe", 5)
    with counted_logits(frozen.base.model) as seen:
        frozen.read(rows)
    assert seen == [5]


def test_answers_do_not_depend_on_batches(tiny_folder: Path) -> None:
    config = BaseModelConfig(path=str(tiny_folder))
    answers = []
    for tokens in (100_000, 100, 1):
        frozen = FrozenBase(config, replace(WORKERS, tokens_per_batch=tokens))
        rows = prompts(frozen.base.processor, "describe", 4) + prompts(frozen.base.processor, "repeat", 4)
        texts, passes = [""] * len(rows), 0
        for members, batch in frozen.batches(rows):
            passes += 1
            for i, text in zip(members, frozen.answer(batch, 4), strict=True):
                texts[i] = text
        answers.append((passes, texts))
    assert len({passes for passes, _ in answers}) == 3
    assert answers[0][1] == answers[1][1] == answers[2][1]


def test_the_device_is_the_configured_one(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU does not change where a run without `training.gpu` computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    workers = InferenceWorkers.of(TrainingConfig(cpus_per_worker=1), EvaluationConfig(gpus_per_worker=2))
    assert workers.devices == ("cpu",)
    assert FrozenBase(BaseModelConfig(path=str(tiny_folder)), workers).base.model.device.type == "cpu"
    gpus = InferenceWorkers.of(TrainingConfig(gpu=True), EvaluationConfig(gpus_per_worker=2, workers=3))
    assert (gpus.count, gpus.devices) == (3, ("cuda:0", "cuda:1"))
