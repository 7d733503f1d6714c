"""Whether micro-batches and workers change the gradient of a step, whose rows' answers are of 2 and 21 tokens.

One step of 32 rows through DeepSpeed (ZeRO-1), dealt in three ways: 1 x 32, 4 micro-batches of 8, 2 workers of 16.
`gradient_difference`: largest norm of the difference from 1 x 32, as a share of the gradient's norm.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from jobs.benchmark.real_size.ranks import run_ranks
from pipeline.config import BaseModelConfig, ExpertConfig, TrainingConfig
from pipeline.data.loading.batch_loader import StepLayout
from pipeline.models.bases import load_base
from pipeline.models.encoding import Encoded, collate_for, encode
from pipeline.training.loop import StageClock, run_steps
from pipeline.training.lora import with_lora
from pipeline.training.zero import start_engine, zero_config

ROWS = 32
WAYS = {"1 x 32": (1, 32), "4 x 8": (1, 8), "2 workers x 16": (2, 16)}
"""Workers, and rows of one forward pass."""


def measure() -> dict[str, float]:
    """Returns `gradient_difference`."""
    gradients = [run_ranks(gradient, workers, micro_batch)[0] for workers, micro_batch in WAYS.values()]
    reference = gradients[0]
    difference = max(float((other - reference).norm() / reference.norm()) for other in gradients[1:])
    return {"gradient_difference": difference}


def rows(processor: Any) -> list[Encoded]:
    """Returns rows whose answers have 2 and 21 tokens, the end token among them."""
    texts = ["red", "red " * 20]
    return [
        encode(
            processor,
            [
                {"role": "user", "content": f"repeat : {'blue ' * (1 + number // 2 % 4)}"},
                {"role": "assistant", "content": texts[number // 2 % 2].strip()},
            ],
            [],
        )
        for number in range(ROWS)
    ]


def gradient(micro_batch: int) -> torch.Tensor:
    """Returns the gradient of one step before clipping (P,), on every rank of the current group."""
    from deepspeed.utils import safe_get_full_grad

    layout = StepLayout(ROWS, dist.get_world_size(), micro_batch)
    base = load_base(BaseModelConfig())
    torch.manual_seed(0)
    model = with_lora(base, ExpertConfig(rank=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.02)  # with B = 0, A would have no gradient
    settings = zero_config(
        TrainingConfig(), micro_batch=micro_batch, accumulated=layout.accumulation, max_grad_norm=1e9
    )
    engine = start_engine(model, settings, learning_rate=1e-3, weight_decay=0.0, schedule=lambda step: 1.0)
    gradients: list[torch.Tensor] = []
    step = engine.step

    def look_then_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            gradients.append(torch.cat([safe_get_full_grad(parameter).flatten() for parameter in trained]))
        step()

    engine.step = look_then_step
    all_rows = rows(base.processor)
    batches = [
        collate_for(base.processor, [all_rows[position] for position in positions])
        for positions in layout.share(dist.get_rank())
    ]
    run_steps(
        engine, OneStep(batches), range(1), divergence_factor=1e9, clock=StageClock(), on_step=lambda step, loss: None
    )
    engine.destroy()
    return gradients[0]


class OneStep:
    """A loader of one step."""

    wait_seconds = 0.0

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        return self._batches
