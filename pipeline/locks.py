"""File locks between processes: who holds one is written into it, and the kernel releases it when its holder dies.

A file that was left behind locks nothing. Storage without file locks (some network file systems) is reported by a
warning: there, only the name of the holder is left to go by.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import psutil

POLL_SECONDS = 0.1
PATIENT_SECONDS = 3.0
"""How long one waits for a lock before one says so."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

_logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """A lock that another process holds; `holder` names it."""

    def __init__(self, file: Path, holder: str) -> None:
        super().__init__(f"{file} is locked by {holder}")
        self.holder = holder


@contextmanager
def file_lock(
    file: Path, *, wait: bool = True, on_wait: Callable[[str], None] = _logger.warning, why: str = ""
) -> Iterator[None]:
    """Holds the lock `file`, made if need be; waits for it, or raises LockedError without `wait`.

    Whoever waits for more than PATIENT_SECONDS calls `on_wait` once, with a sentence that names `why` and the holder.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as opened:
        began, reported = time.monotonic(), False
        while not _locked(opened):
            if not wait:
                raise LockedError(file, _holder(opened))
            if not reported and time.monotonic() - began > PATIENT_SECONDS:
                on_wait(f"waiting for {_holder(opened)}{f', {why}' if why else ''} ({file})")
                reported = True
            time.sleep(POLL_SECONDS)
        _write(opened, json.dumps(_self()))
        try:
            yield
        finally:
            _write(opened, "")  # closing the file releases the lock


def is_held(file: Path) -> bool | None:
    """Returns whether a process holds the lock `file`; None where its holder is on another machine. The lock is not touched."""
    try:
        with file.open() as opened:
            holder = _read(opened)
    except OSError:
        return False
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return None
    try:
        began = psutil.Process(int(str(holder["pid"]))).create_time()
        return began <= datetime.fromisoformat(str(holder["since"])).timestamp() + 1  # else another one with its number
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


@contextmanager
def staging(target: Path, *, why: str) -> Iterator[Path]:
    """Yields a folder for unfinished files to the one process that may write `target`; it is gone afterwards.

    It lies beside `target`, so that a rename puts there what is whole. `why` says to those who wait what is done.
    """
    prefix = f"{target.name}.staging.{socket.gethostname()}."
    with file_lock(target.with_name(f"{target.name}.lock"), why=why):
        for left in target.parent.glob(f"{prefix}*"):  # its process was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def made_once(target: Path, make: Callable[[Path], None], *, why: str, mark: str = "") -> None:
    """Has `make` write the file or folder `target`, unless it is there; of several processes one writes, the others wait.

    `make` gets another path and `target` appears whole. A folder counts as there if it holds the file `mark`.
    """
    if (target / mark).exists():
        return
    with staging(target, why=why) as folder:
        if (target / mark).exists():  # another process was faster
            return
        make(folder / target.name)
        if mark:
            (folder / target.name / mark).touch()
            shutil.rmtree(target, ignore_errors=True)
        (folder / target.name).rename(target)


def _locked(opened: TextIO) -> bool:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _logger.warning("%s: this storage has no file locks; last held by %s", opened.name, _holder(opened))
        return True
    left = _read(opened)
    if left and left.get("host") != socket.gethostname():
        # Some network file systems lock within one machine only; mostly, though, its holder was killed.
        _logger.warning("%s: %s did not release it; should it still be running, end it", opened.name, _holder(opened))
    return True


def _self() -> dict[str, object]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _read(opened: TextIO) -> dict[str, object]:
    opened.seek(0)
    try:
        holder = json.loads(opened.read() or "{}")
    except ValueError:  # caught while it is written
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder(opened: TextIO) -> str:
    holder = _read(opened)
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _write(opened: TextIO, text: str) -> None:
    opened.seek(0)
    opened.truncate()
    opened.write(text)
    opened.flush()
