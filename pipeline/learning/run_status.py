"""What the runs of an output folder are doing, or how they ended: written by each run, read by `pointsman status`.

A run that is killed writes nothing more; that nobody holds its lock tells so. Reading disturbs no run.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import without_secrets
from pipeline.config.learning import SHARED_FOLDERS
from pipeline.files import write_json
from pipeline.locks import is_held

if TYPE_CHECKING:  # whoever reads needs no Ray
    from pipeline.learning.progress import Progress, StageProgress
    from pipeline.storage.remote import RemoteFolder
    from pipeline.training.telemetry import Step

LOCK = "run.lock"
"""File in a run's folder that the process holds which works there."""

CLAIMS = "claims"
"""Folder of a run at an address where the process says so that works there."""

FILE = Path("state") / "status.json"
"""File in a run's folder that says what it is doing."""

SUMMARY = "summary.json"

EVERY = 2.0
"""Seconds between two writings."""

SILENT = 120.0
"""Seconds without a sign of life, by the clocks of both, after which a run on another machine is called so: it may have been
killed, or one of the clocks is wrong.
"""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands."""

    name: str
    folder: str
    state: str
    """running, finished, failed, stopped (by a signal) or killed; silent, on another machine and not heard of for a while;
    unfinished where an earlier release has not said.
    """
    job: str
    """Kind of work: learn, compare, add, sweep, ..."""
    progress: str
    """What it is doing, or the error that has ended it."""
    started: str | None
    """In UTC; of the last start, where it was resumed."""
    updated: str | None
    """Last sign of life, in UTC."""
    tasks: int | None
    """Tasks of the stream."""
    where: str
    """Host and process that work on it, or the file to look at."""

    def to_json(self) -> dict[str, Any]:
        """Returns all of it."""
        return asdict(self)


class StatusFile:
    """Keeps the file of one run up to date, in a thread of its own, while its context lasts."""

    def __init__(self, folder: Path, *, name: str, job: str, tasks: Sequence[str]) -> None:
        self._file, self._tasks = folder / FILE, list(tasks)
        self._known: dict[str, Any] = {
            "name": name,
            "job": job,
            "tasks": len(self._tasks),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _now(),
        }
        self._doing: dict[int, str] = {}
        self._last, self._keys = "", count()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._go, name="status", daemon=True)

    def __enter__(self) -> "StatusFile":
        self._write("running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # a full disk has its own message
            if error is None:
                self._write("finished")
            elif isinstance(error, KeyboardInterrupt):
                self._write("stopped")
            else:
                text = next(iter(str(error).splitlines()), "")
                self._write("failed", text if text and isinstance(error, Exception) else repr(error))

    @contextmanager
    def doing(self, text: str) -> Iterator[int]:
        """Notes something that goes on while the context lasts; yields its key for `update`."""
        with self._lock:
            key = next(self._keys)
            self._doing[key] = text
        try:
            yield key
        finally:
            with self._lock:
                self._last = self._doing.pop(key)

    def update(self, key: int, text: str) -> None:
        """Notes how far something is that goes on."""
        with self._lock:
            if key in self._doing:
                self._doing[key] = text

    def place(self, task: str) -> str:
        """Returns a task with its place in the stream."""
        if task not in self._tasks:
            return task
        return f"task {self._tasks.index(task) + 1}/{len(self._tasks)}, {task}"

    def _go(self) -> None:
        while not self._ended.wait(EVERY):
            with suppress(OSError):  # a full disk is told where results are written
                self._write("running")

    def _write(self, state: str, error: str = "") -> None:
        with self._lock:
            now = "; ".join(self._doing.values()) or self._last
        progress = without_secrets(error) if error else now if state in ("running", "stopped") else ""
        write_json(self._file, self._known | {"state": state, "progress": progress, "updated": _now()})


class RecordedProgress:
    """A session's progress that is also noted in its status file."""

    def __init__(self, shown: "Progress", file: StatusFile) -> None:
        self._shown, self._file = shown, file
        self.log, self.show = shown.log, shown.show

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """Shows that something goes on; yields what is told how far it is."""
        with self._shown.working(text) as show, self._file.doing(text) as key:

            def tell(done: str) -> None:
                show(done)
                self._file.update(key, f"{text}: {done}")

            yield tell

    @contextmanager
    def training(self, task: str) -> Iterator["_RecordedStage"]:
        """Shows the stages of one task."""
        place = self._file.place(task)
        with self._shown.training(task) as stage, self._file.doing(f"{place}: starting workers") as key:
            yield _RecordedStage(stage, self._file, key, place)


class _RecordedStage:
    def __init__(self, shown: "StageProgress", file: StatusFile, key: int, place: str) -> None:
        self._shown, self._file, self._key, self._place = shown, file, key, place

    def update(self, steps: "Sequence[Step]") -> None:
        """Shows the latest of these steps."""
        self._shown.update(steps)
        for step in [step for step in steps if not step.remark][-1:]:
            done = f"{step.stage} stage {step.step}/{step.steps}, loss {step.loss:.3f}"
            self._file.update(self._key, f"{self._place}: {done}")


def runs_below(output: Path) -> list[RunStatus]:
    """Returns how the runs in an output folder stand, those with the latest sign of life first."""
    if not output.is_dir():
        return []
    folders = (folder for folder in sorted(output.iterdir()) if folder.is_dir())
    statuses = [status for folder in folders if (status := status_of(folder)) is not None]
    return sorted(statuses, key=lambda status: status.updated or "", reverse=True)


def runs_at(output: "RemoteFolder") -> list[RunStatus]:
    """Returns how the runs at an address stand, those with the latest sign of life first. Raises StorageError."""
    names = [name for name in output.folders() if name not in SHARED_FOLDERS]
    statuses = [status for name in names if (status := _status_at(output, name)) is not None]
    return sorted(statuses, key=lambda status: status.updated or "", reverse=True)


def _status_at(output: "RemoteFolder", name: str) -> RunStatus | None:
    from pipeline.storage.claim import owner_of  # with pyarrow, which folders do not need

    folder = output / name
    noted = _object(folder.read(FILE.as_posix()))
    if not noted:
        return None
    owner, state = owner_of(folder / CLAIMS), str(noted.get("state"))
    state = "running" if owner is not None else "killed" if state == "running" else state
    files = ("error.log", SUMMARY) if state == "failed" else ("report.html", SUMMARY)
    look_at = next((str(folder / file) for file in files if folder.exists(file)), str(folder))
    return RunStatus(
        name=name,
        folder=str(folder),
        state=state,
        job=str(noted.get("job") or ""),
        progress=str(noted.get("progress") or ""),
        started=noted.get("started"),
        updated=owner.beat if owner is not None else noted.get("updated"),
        tasks=noted.get("tasks"),
        where=f"{owner.host}, process {owner.process}" if owner is not None else look_at,
    )


def status_of(folder: Path) -> RunStatus | None:
    """Returns how the run in a folder stands; None where none has worked there."""
    if not any((folder / name).exists() for name in (LOCK, FILE, SUMMARY)):
        return None
    noted, summary = _read(folder / FILE), _read(folder / SUMMARY)
    state = noted.get("state") or ("finished" if (folder / SUMMARY).exists() else "unfinished")
    holder = is_held(folder / LOCK)
    if holder:
        state = "running"
    elif state == "running" and holder is None:  # its lock is not seen from here
        state = "running" if abs(_seconds_since(noted.get("updated"))) < SILENT else "silent"
    elif state == "running":
        state = "killed"
    where = f"{noted.get('host')}, process {noted.get('process')}"
    if state == "silent":
        where += ": killed, unless its clock is wrong"
    elif state != "running":
        where = _look_at(folder, state)
    return RunStatus(
        name=folder.name,
        folder=str(folder),
        state=state,
        job=str(noted.get("job") or summary.get("name") or ""),
        progress=str(noted.get("progress") or ""),
        started=noted.get("started") or summary.get("started"),
        updated=noted.get("updated") or _modified(folder / SUMMARY),
        tasks=noted.get("tasks"),
        where=where,
    )


def _look_at(folder: Path, state: str) -> str:
    """Returns the file that says most about a run that does not work."""
    names = ("error.log", SUMMARY) if state == "failed" else ("report.html", SUMMARY)
    return str(next((folder / name for name in names if (folder / name).exists()), folder))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        return _object(file.read_bytes())
    except OSError:  # not there: other files say something
        return {}


def _object(content: bytes | None) -> Mapping[str, Any]:
    try:
        value = json.loads(content or b"{}")
    except ValueError:  # damaged
        return {}
    return value if isinstance(value, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _seconds_since(time: str | None) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() if time else float("inf")


def _modified(file: Path) -> str | None:
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        return None
