"""What Ray Train's controller does when workers fail; a room of its own, since the controller imports all that stands here."""

import re
from typing import Any

import ray
from ray.train import UserCallback

_DIED, _LOG = "health check", re.compile(r"log_file_path='([^']+)'")
"""How Ray Train words the death of a worker's process, and where it says what that process printed."""


class SessionEnded(Exception):
    """Workers have failed too often; raised in Ray Train's controller, which then ends the run."""


class Failures(UserCallback):
    """Tells the queue of failed workers, and ends the run where it has had enough."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller."""
        # Where one rank's process dies, others raise for want of it.
        died = [rank for rank, error in worker_exceptions.items() if _DIED in str(error)]
        rank = min(died or worker_exceptions)
        reason = str(worker_exceptions[rank])
        if died:
            log = _LOG.search(reason)
            reason = f"the worker of rank {rank} died (killed, or out of memory)" + (
                f"; its log: {log[1]}" if log else ""
            )
        taken_away = any(getattr(error, "preempted", False) for error in worker_exceptions.values())
        if not ray.get(self._queue.failed.remote(reason, counts=not taken_away)):
            raise SessionEnded(reason)
