"""Buffers metrics for MLflow in a file of the run, until the registry answers."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from pipeline.registry.retries import is_away, is_silent, reason_of

PAUSE_SECONDS = 15.0
"""Seconds between attempts while the registry does not answer; each attempt blocks progress for some seconds."""


MAX_SERIES = 256
"""Number of most recently logged metrics whose points are remembered; finished tasks log no more."""


class Point(NamedTuple):
    """A value of a metric of an MLflow run; `time` in milliseconds since 1970."""

    run_id: str
    key: str
    value: float
    step: int
    time: int


class MetricBuffer:
    """Logs metrics through a file, so that none is lost while the registry does not answer.

    Writing a point twice changes nothing in MLflow, so a process killed between writing and clearing the file does no harm.
    Only one process may use a spool at a time.
    """

    def __init__(self, file: Path, notify: Callable[[str], None]) -> None:
        self._file, self._notify = file, notify
        self._points = list(_read(file))
        self._again_at, self._away = 0.0, False
        self._old: set[tuple[str, str]] = set()
        self._logged: dict[tuple[str, str], set[tuple[int, float]]] = {}
        """Points (step, value) that are written or waiting, by run and metric."""
        self._new(self._points)
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Number of points that are not in the registry yet."""
        return len(self._points)

    def go_on(self, run_id: str) -> None:
        """Looks up the metrics that an earlier process logged for a run; their points are not written again."""
        with suppress(MlflowException, requests.RequestException):  # duplicate points do no harm
            if not is_silent():
                self._old = {(run_id, key) for key in MlflowClient().get_run(run_id).data.metrics}

    def _new(self, points: Iterable[Point]) -> list[Point]:
        """Returns the points that are neither written nor waiting."""
        new = []
        for point in points:
            series = point.run_id, point.key
            logged = self._logged[series] = self._logged.pop(series, set())  # moved to the end: the last to be dropped
            while len(self._logged) > MAX_SERIES:
                del self._logged[next(iter(self._logged))]
            if series in self._old and not is_silent():
                self._old.remove(series)
                with suppress(MlflowException, requests.RequestException):
                    logged |= {(metric.step, metric.value) for metric in MlflowClient().get_metric_history(*series)}
            if (point.step, point.value) not in logged:
                logged.add((point.step, point.value))
                new.append(point)
        return new

    def log(self, run_id: str, points: Iterable[tuple[str, float, int]]) -> None:
        """Adds (metric, value, step) points of a run, and writes waiting points if the registry answers."""
        now = int(time.time() * 1000)
        with self._lock:
            new = self._new(Point(run_id, key, value, step, now) for key, value, step in points)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(f"\n{json.dumps(point)}" for point in new)  # the last line may have been cut off
            self._points += new
        self.write(at_once=False)

    def write(self, *, at_once: bool = True) -> bool:
        """Writes waiting points; returns whether none is left.

        Without `at_once`, does nothing within PAUSE_SECONDS of a failed attempt.
        """
        with self._lock:
            if not self._points:
                return True
            if not at_once and time.monotonic() < self._again_at:
                return False
            count = len(self._points)
            if (reason := self._send()) is not None:
                self._again_at = time.monotonic() + PAUSE_SECONDS
                if not self._away:
                    self._notify(f"  metrics wait in {self._file}: the registry does not answer ({reason})")
                self._away = True
                return False
            self._file.write_text("")
            self._points = []
            if self._away:
                self._notify(f"  the registry answers again: {count} points of metrics written")
            self._away = False
            return True

    def _send(self) -> str | None:
        """Sends all points; returns why the registry does not answer, or None."""
        if is_silent():
            return "it cannot be reached"
        for run_id in dict.fromkeys(point.run_id for point in self._points):
            points = [point for point in self._points if point.run_id == run_id]
            try:
                _log(run_id, points)
            except (MlflowException, requests.RequestException) as error:
                if is_away(error):
                    return reason_of(error)
                # Such as a deleted run; kept points would block all later ones.
                self._notify(f"  {len(points)} points of metrics of run {run_id} are refused: {reason_of(error)}")
        return None


def _log(run_id: str, points: list[Point]) -> None:
    client = MlflowClient()
    metrics = [Metric(point.key, point.value, point.time, point.step) for point in points]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])


def _read(file: Path) -> Iterator[Point]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            run_id, key, value, step, when = json.loads(line)
            yield Point(str(run_id), str(key), float(value), int(step), int(when))
        except (ValueError, TypeError):  # empty, damaged, or cut off when the process was killed
            continue
