"""How a training goes, for those who watch a cluster: Ray's metrics from every rank, and lines of its log.

Ray collects its metrics on every node and offers them to Prometheus, with the prefix `ray_`; its dashboard lists the endpoints.
None of this says anything about results: those are MLflow's.
"""

import logging
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ray.util.metrics import Gauge

from pipeline.training.loop import StageClock

METRICS = {
    "pointsman_loss": "Loss of the last optimizer step.",
    "pointsman_rows_per_second": "Rows that all ranks learned per second, over the last seconds.",
    "pointsman_data_wait": "Share of the last seconds in which this rank waited for rows.",
    "pointsman_gpu_memory_bytes": "Largest GPU memory of this rank's tensors so far.",
}
"""Metrics of a rank, and what they mean."""

TAGS = ("run", "task", "stage", "rank")

EVERY = 2.0
"""Seconds between two values: Ray collects them every few seconds."""

LINE_EVERY = 10.0
"""Seconds between two lines of the log."""

_logger = logging.getLogger(__name__)


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, description=METRICS[name], tag_keys=TAGS)


class Monitor:
    """Tells how one stage of a task goes on one rank."""

    def __init__(self, storage: Path, task: str, stage: str, *, rank: int, steps: int, rows_per_step: int) -> None:
        self._tags = {"run": storage.parent.name, "task": task, "stage": stage, "rank": str(rank)}
        self._known = {"task": task, "stage": stage, "steps": steps}
        self._steps, self._rows = steps, rows_per_step
        self._told = self._logged = time.monotonic()
        self._step = 0
        self._waited = 0.0

    def step(self, step: int, loss: float, clock: StageClock) -> None:
        """Tells of a step, if the last one told of is a moment ago, or if it is the last."""
        now = time.monotonic()
        if not self._step:  # from here on, or from a checkpoint on
            self._step, self._waited, self._told = step, clock.wait_seconds, now
        past = now - self._told
        if past < EVERY and step < self._steps:
            return
        values: dict[str, float] = {"pointsman_loss": loss}
        if past and step > self._step:
            values["pointsman_rows_per_second"] = (step - self._step) * self._rows / past
            values["pointsman_data_wait"] = (clock.wait_seconds - self._waited) / past
        if torch.cuda.is_available():
            values["pointsman_gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        for name, value in values.items():
            _gauge(name).set(value, tags=self._tags)
        self._step, self._waited, self._told = step, clock.wait_seconds, now
        if now - self._logged >= LINE_EVERY or step == self._steps:
            self._logged = now
            self._log(step, loss, values)

    def _log(self, step: int, loss: float, values: dict[str, float]) -> None:
        shown: dict[str, Any] = {"step": step, "loss": round(loss, 4)}
        for name, key in (("pointsman_rows_per_second", "rows_per_second"), ("pointsman_data_wait", "data_wait")):
            if name in values:
                shown[key] = round(values[name], 3)
        _logger.info("%s stage, step %d of %d", self._known["stage"], step, self._steps, extra=self._known | shown)
