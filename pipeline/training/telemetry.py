"""Progress while training runs: rank 0 pushes its steps, the driver drains in a thread of its own.

Ray Train's own `report` is a barrier over all workers and its callbacks run in another process; progress bars and MLflow
want one writer, the driver, at no cost to the workers.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray


class Step(NamedTuple):
    """One optimizer step of a task's stage; `step` counts from 1 to `steps`."""

    task: str
    stage: str
    step: int
    steps: int
    loss: float


class Telemetry:
    """Holds the steps that the driver has not fetched yet."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, str, int, int, float]] = []

    def push(self, steps: list[tuple[str, str, int, int, float]]) -> None:
        """Adds steps."""
        self._steps += steps

    def drain(self) -> list[tuple[str, str, int, int, float]]:
        """Returns the steps since the last call."""
        steps, self._steps = self._steps, []
        return steps


@contextmanager
def listening(on_steps: Callable[[list[Step]], None], *, every: float = 1.0) -> Iterator[Any]:
    """Yields a telemetry actor whose steps reach `on_steps`, in order, about every `every` seconds."""
    actor: Any = ray.remote(num_cpus=0)(Telemetry).remote()
    stop = threading.Event()

    def deliver() -> None:
        if steps := [Step(*step) for step in ray.get(actor.drain.remote())]:
            on_steps(steps)

    def listen() -> None:
        while not stop.wait(every):
            deliver()

    thread = threading.Thread(target=listen, name="telemetry", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join()
        deliver()
        ray.kill(actor)
