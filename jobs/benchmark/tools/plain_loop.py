"""LoRA training as one would write it without Ray or DeepSpeed: what benchmarks compare with, and train cheaply by."""

from collections.abc import Iterator, Sequence
from itertools import islice
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ExpertConfig
from pipeline.models.encoding import Encoded, collate
from pipeline.training.expert_stage import warm_up_cosine


def shuffled_batches(rows: Sequence[Encoded], size: int, *, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """Yields collated batches without end, every row once an epoch, in the order of torch's global seed."""
    while True:
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(rows) - size + 1, size):
            yield collate([rows[i] for i in order[start : start + size]], pad_token_id=pad_token_id)


def plain_steps(model: Any, config: ExpertConfig, batches: Iterator[dict[str, Tensor]]) -> list[float]:
    """Runs the expert stage's steps on a PEFT model, in this process; returns the seconds of each, its batch included."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_cosine(config))
    seconds, started = [], monotonic()
    for batch in islice(batches, config.steps):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(monotonic() - started)
        started = monotonic()
    model.eval()
    return seconds
