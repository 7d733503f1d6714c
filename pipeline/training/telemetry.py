"""Progress while training runs: rank 0 pushes its steps, the driver drains in a thread of its own.

Ray Train's own `report` is a barrier over all workers and its callbacks run in another process; progress bars and MLflow
need one writer, the driver, at no cost to the workers. An error here never ends a training: it becomes a warning.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

ATTEMPTS = 3
"""Attempts to fetch the last steps when training is over."""

_logger = logging.getLogger(__name__)


RESTART = "restart"
"""In place of a stage: workers have failed and are started again."""

Sent = (
    tuple[str, str, int, int, float]
    | tuple[str, str, int, int, float, str]
    | tuple[str, str, int, int, float, str, float | None]
)
"""A step as it travels: its fields."""


class Step(NamedTuple):
    """One optimizer step of a task's stage; `step` counts from 1 to `steps`.

    Of a validation `step` is the last one before it, of a restart the number of failures so far, and `steps` the most allowed.
    """

    task: str
    stage: str
    step: int
    steps: int
    loss: float
    reason: str = ""
    """Why workers were started again."""
    accuracy: float | None = None
    """Of a validation: the share of the held-out rows that greedy decoding answers."""

    @property
    def remark(self) -> str | None:
        """What there is to say of a validation or a restart; None of a step, which moves a bar."""
        if self.stage == "validation":
            return f"{self.task}: held-out loss {self.loss:.3f}, accuracy {self.accuracy:.3f} after step {self.step}"
        if self.stage == RESTART:
            count = f"restart {self.step} of {self.steps}" if self.step else "a restart that does not count"
            reason = next((line for line in reversed(self.reason.splitlines()) if line.strip()), "workers failed")
            return f"{self.task}: {reason.strip()}; {count}, from the last checkpoint"
        return None


class Telemetry:
    """Keeps steps until the driver confirms that it has them: a lost answer is sent again."""

    def __init__(self) -> None:
        self._steps: list[Sent] = []
        self._dropped = 0

    def count(self) -> int:
        """Returns how many steps were ever pushed."""
        return self._dropped + len(self._steps)

    def push(self, steps: list[Sent]) -> None:
        """Adds steps."""
        self._steps += steps

    def after(self, count: int) -> list[Sent]:
        """Drops the first `count` steps ever pushed, which the driver has, and returns the others."""
        self._steps = self._steps[count - self._dropped :]
        self._dropped = count
        return self._steps


@contextmanager
def receiving_steps(
    on_steps: Callable[[list[Step]], None], actor: Any, *, every: float = 1.0, timeout: float = 10.0
) -> Iterator[None]:
    """Passes the steps that reach the telemetry `actor` from now on to `on_steps`, in order and once, every `every` seconds.

    An exception in `on_steps` neither ends the training nor stops the delivery: the first one is logged as a warning, their
    number at the end. Steps that Ray does not return within `timeout` seconds come with the next ones.
    """
    stop = threading.Event()
    delivered, failures = ray.get(actor.count.remote()), 0

    def deliver() -> bool:
        """Delivers what there is; returns whether Ray has answered."""
        nonlocal delivered, failures
        try:
            steps = [Step(*step) for step in ray.get(actor.after.remote(delivered), timeout=timeout)]
        except RayError as error:
            _logger.info("training's steps cannot be fetched now: %s", error)
            return False
        delivered += len(steps)
        # In a future an exception of `on_steps` is an object, and ends nothing.
        if steps and (raised := executor.submit(on_steps, steps).exception()) is not None:
            failures += 1
            if failures == 1:
                _logger.warning(
                    "training goes on, but its progress could not be shown: %s: %s",
                    type(raised).__name__,
                    raised,
                    exc_info=raised,
                )
        return True

    def deliver_regularly() -> None:
        while not stop.wait(every):
            deliver()

    with ThreadPoolExecutor(1, thread_name_prefix="telemetry") as executor:
        thread = threading.Thread(target=deliver_regularly, name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if not any(deliver() for _ in range(ATTEMPTS)):
                _logger.warning("the last steps of this training could not be fetched: its curves end early")
            if failures:
                _logger.warning("progress could not be shown %d times; the training itself is complete", failures)
