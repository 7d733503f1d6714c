"""Between Tune's trials and the driver: a trial asks for its point, the driver works it off and reports.

An actor. Trials are processes of Tune's; training workers, evaluators and the store of experts belong to the driver, who gives
each training to as many trials as want it.
"""

import asyncio
from typing import Any

NAME = "sweep"
"""Name of the actor in the job's namespace: a trial of a sweep that goes on finds the driver's present one."""

FAILURE = "failure"
"""Key in a report: why there is no other."""


class TrialQueue:
    """An actor of one event loop, where calls may wait for each other."""

    def __init__(self) -> None:
        self._asked: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._changed = asyncio.Condition()

    # The trials' side

    async def ask(self, trial: str, point: dict[str, Any]) -> None:
        """Asks for a point's reports; a trial that was started again asks anew."""
        self._reports[trial] = []
        await self._asked.put((trial, point))

    async def report(self, trial: str, number: int) -> dict[str, Any]:
        """Waits for a trial's report of this number; a last one is `done`, or has a FAILURE."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._reports[trial]) > number)
        return self._reports[trial][number]

    # The driver's side

    async def take(self) -> tuple[str, dict[str, Any]] | None:
        """Waits for a trial that asks; returns its name and point, None when the sweep is over."""
        return await self._asked.get()

    async def put(self, trial: str, report: dict[str, Any]) -> None:
        """Reports to a trial."""
        self._reports.setdefault(trial, []).append(report)
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Ends `take`."""
        await self._asked.put(None)
