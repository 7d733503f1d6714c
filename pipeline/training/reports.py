"""What a rank tells of its training while it goes on: steps to the driver, in few messages."""

import time
from typing import Any

from pipeline.training.telemetry import Sent

EVERY = 0.8
"""Seconds between two messages: a remote call costs about a millisecond of a step's time."""


class Reports:
    """Steps of one task for the driver; ranks but the first say nothing."""

    def __init__(self, queue: Any, task: str, *, rank: int) -> None:
        self._queue, self._task, self._rank = queue, task, rank
        self._pending: list[Sent] = []
        self._sent_at = 0.0

    def step(self, stage: str, step: int, steps: int, loss: float, accuracy: float | None = None) -> None:
        """Tells of a step; of a validation at once, since it may decide whether the training goes on."""
        if self._rank != 0:
            return
        self._pending.append((self._task, stage, step, steps, loss, "", accuracy))
        if step == steps or stage == "validation" or time.monotonic() - self._sent_at >= EVERY:
            self.send()

    def send(self) -> None:
        """Tells of the steps that the driver does not know yet."""
        if self._pending:
            self._queue.push.remote(self._pending)
            self._pending, self._sent_at = [], time.monotonic()
