"""The loop of optimizer steps that both stages share."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipeline.models.encoding import IGNORED, to_device
from pipeline.training.loss import answer_loss
from pipeline.training.ranks import summed


class Divergence(ValueError):
    """A loss that is not finite or explodes."""


class Loader(Protocol):
    """Gives the micro-batches of one optimizer step after the other."""

    wait_seconds: float

    def __next__(self) -> list[dict[str, Any]]:
        """Returns this rank's micro-batches of the next step."""
        ...

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Returns itself."""
        ...


@dataclass
class StageClock:
    """What a stage has cost so far."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Of every step; `seconds` may hold more than their sum."""


def run_steps(
    engine: Any,
    loader: Loader,
    steps: range,
    *,
    divergence_factor: float,
    clock: StageClock,
    on_step: Callable[[int, float], object],
    before: Callable[[int, dict[str, Any]], None] = lambda number, batch: None,
    wanted: Callable[[], bool] = lambda: False,
    meet: Callable[[int], None] = lambda step: None,
    penalty: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Runs optimizer steps; `on_step(step, loss)` after each, `before(i, micro_batch)` ahead of each forward pass.

    Ends early where `on_step` returns True, which all ranks must do alike.

    Where a rank has `wanted` to ahead of a step, all ranks `meet(step)` after it.

    The loss of a step is the mean cross-entropy over the answer tokens of all its rows,

        L = sum over ranks, micro-batches, answer tokens of  -log p(token)  /  number of these tokens

    whatever the number of ranks and the size of micro-batches, and the `penalty` where there is one; all ranks know its value,
    so that all see a divergence at the same step. Raises Divergence when it is not finite, or exceeds `divergence_factor` times
    the first one.
    """
    device = engine.device
    for step in steps:
        started = time.monotonic()
        waited = loader.wait_seconds
        batches = next(loader)
        counts = [float(sum(answer_tokens(batch) for batch in batches)), float(wanted())]
        tokens, meeting = summed(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        # DeepSpeed takes the mean over ranks of what we want the sum of.
        share = dist.get_world_size() / max(tokens, 1.0)
        total = torch.zeros((), device=device)
        for i, host_batch in enumerate(batches):
            batch = to_device(host_batch, device)
            before(i, batch)
            loss = answer_loss(engine, batch, reduction="sum") * share
            if penalty is not None:
                loss = loss + penalty() / len(batches)
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
            total += loss.detach() / dist.get_world_size()
        value = summed(total.double()).item()
        clock.losses.append(value)
        if not math.isfinite(value):
            raise Divergence(f"the loss is {value} at step {step + 1}; lower the learning rate, or check the data")
        if value > divergence_factor * max(clock.losses[0], 0.1):
            raise Divergence(
                f"the loss rose from {clock.losses[0]:.3g} to {value:.3g} by step {step + 1} (training.divergence_factor is "
                f"{divergence_factor:g}); lower the learning rate"
            )
        clock.step_seconds.append(time.monotonic() - started)
        clock.seconds += clock.step_seconds[-1]
        clock.wait_seconds += loader.wait_seconds - waited
        enough = on_step(step + 1, value)
        if meeting:
            meet(step + 1)
        if enough is True:
            return


def answer_tokens(batch: dict[str, Any]) -> int:
    """Returns how many tokens of a batch are learned."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
