"""What a training session's workers ask for their next training, and tell of the last one.

An actor between driver and ranks: the driver puts trainings and waits for outcomes, every rank takes the same ones in the same
order. It outlives workers that die, so those that come after them go on with the training that has no outcome yet. It hands
rows on as they are boxed: to look at them it would have to import all that training does, which takes seconds and memory.
"""

import asyncio
import math
from typing import Any

from pipeline.training.telemetry import RESTART, Telemetry


class TrainingQueue(Telemetry):
    """Jobs in the order in which they were put; an actor of one event loop, where calls may wait for each other."""

    def __init__(self, max_failures: int) -> None:
        super().__init__()
        self._max_failures = max_failures
        """How often workers may fail at one training, or before they begin one."""
        self._specs: list[tuple[dict[str, Any], list[Any]] | None] = []
        """Settings and boxed rows; None for those that are done, so that rows do not pile up."""
        self._outcomes: dict[int, dict[str, Any]] = {}
        self._failures = 0
        self._unwanted: set[int] = set()
        self._workers: dict[int, Any] = {}
        self._closed = False
        self._changed = asyncio.Condition()

    # The driver's side

    async def put(self, spec: dict[str, Any], rows: list[Any]) -> int | None:
        """Adds a training, its rows as a reference in a list; returns its number, None where there are no workers any more."""
        if self._closed:
            return None
        self._specs.append((spec, rows))
        await self._tell()
        return len(self._specs) - 1

    async def outcome(self, number: int) -> dict[str, Any]:
        """Waits for a training's end; returns its metrics, or `failure` with the reason."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._outcomes)
        return self._outcomes[number]

    def give_up(self, number: int) -> None:
        """Says that nobody waits for a training any more: it ends at its next validation, with its outcome."""
        self._unwanted.add(number)

    async def close(self) -> None:
        """Sends the workers home that wait for a training; whoever wants those to stop that train must kill them."""
        self._closed = True
        await self._tell()

    def workers(self) -> list[Any]:
        """Returns the actors that train."""
        return list(self._workers.values())

    # The workers' side

    def enter(self, rank: int, worker: Any) -> None:
        """Notes the actor in which a rank trains."""
        self._workers[rank] = worker

    async def first(self) -> int:
        """Returns the number of the training that workers who start now begin with."""
        return len(self._outcomes)

    async def take(self, number: int) -> tuple[dict[str, Any], list[Any]] | None:
        """Waits for a training; returns its settings and boxed rows, None when there will be no more trainings."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or number < len(self._specs))
        return None if self._closed else self._specs[number]

    def is_wanted(self) -> bool:
        """Whether somebody still waits for the training that the workers are at."""
        return len(self._outcomes) not in self._unwanted

    async def finish(self, number: int, metrics: dict[str, Any]) -> None:
        """Ends a training."""
        self._outcomes[number], self._specs[number] = metrics, None
        self._failures = 0
        await self._tell()

    # Ray Train's controller's side

    async def failed(self, reason: str, *, counts: bool) -> bool:
        """Notes that workers have failed, unless it `counts` for nothing; returns whether to start them again.

        If not, the training that they were at ends with `reason`.
        """
        self._failures += counts
        if self._closed or self._failures > self._max_failures:
            if (number := len(self._outcomes)) < len(self._specs):
                await self.finish(number, {"failure": f"training failed: {reason}"})
            self._closed = True
            return False
        if (number := len(self._outcomes)) < len(self._specs):
            spec, _ = self._specs[number] or ({}, [])
            failures = self._failures if counts else 0
            self.push([(str(spec.get("task")), RESTART, failures, self._max_failures, math.nan, reason)])
        return True

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
