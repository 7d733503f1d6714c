"""Errors from outside (disk, registry, cluster) as one message with file and remedy.

Their traceback goes to a log file, for bug reports.
"""

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.config import without_secrets
from pipeline.errors import UserError

LOG = "error.log"
"""File in a run's folder with the tracebacks of errors that came from outside."""

AGAIN = "then run the same command again: what is finished is kept"

_REMEDIES = {
    errno.ENOSPC: f"the disk is full; make room or choose another `output`, or registry, {AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; make room or choose another `output`, or registry, {AGAIN}",
    errno.EACCES: f"this user may not do that; change the permissions or choose another `output`, or registry, {AGAIN}",
    errno.EPERM: f"this user may not do that; change the permissions or choose another `output`, or registry, {AGAIN}",
    errno.EROFS: f"that place is read-only; choose another `output`, or registry, {AGAIN}",
    errno.ENOTDIR: "a file stands where a folder is needed; move it away or choose another place",
    errno.EISDIR: "a folder stands where a file is needed; name the file",
    errno.EEXIST: "something else has that name; move it away or choose another place",
    errno.EMFILE: f"too many open files; raise the limit (ulimit -n), {AGAIN}",
}


_MISTAKE = re.compile(r"^(?:pipeline|cluster)\.[\w.]+Error: (.+)$", re.MULTILINE)
"""An error of this project at the end of a traceback."""


class OutsideError(UserError):
    """Disk, registry or cluster failed; the message names which, the remedy and the log file."""


@contextmanager
def outside_errors(folder: Path | None = None) -> Iterator[None]:
    """Turns errors of file system, registry and cluster into OutsideError; their traceback goes to `folder`/error.log.

    Without a folder, or where it cannot be written to, the log goes to the folder for temporary files.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _kinds()):
            raise
        if (mistake := _user_error_in(error)) is not None:
            raise mistake from error
        details = f"\n    details    {_log(error, folder)}"
        if (failure := _registry_failure(error)) is not None:
            raise type(failure)(f"{failure}{details}") from error
        raise OutsideError(f"{_message(error)}{details}") from error


def _loaded(library: str, name: str) -> tuple[type[BaseException], ...]:
    """Returns an error's class, if its library was imported: commands that need it not must not wait for it."""
    module = sys.modules.get(f"{library}.exceptions")
    return () if module is None else (getattr(module, name),)


def _kinds() -> tuple[type[BaseException], ...]:
    return OSError, SafetensorError, *_loaded("mlflow", "MlflowException"), *_loaded("ray", "RayError")


def _registry_failure(error: Exception) -> UserError | None:
    """Returns what it means if the registry is away, fails or refuses."""
    if not isinstance(error, (*_loaded("mlflow", "MlflowException"), *_loaded("requests", "RequestException"))):
        return None
    from pipeline.registry.failures import (
        failure_of,
    )  # it imports MLflow, which commands without a registry must not wait for

    return failure_of(error)


def _user_error_in(error: Any) -> UserError | None:
    """Returns the mistake of the user that an error of Ray was raised for, in whichever process."""
    while error is not None:
        inner: Any = getattr(error, "cause", None) if isinstance(error, _loaded("ray", "RayTaskError")) else error
        if isinstance(inner, UserError):
            return inner
        error = inner.__cause__
    return None


def _message(error: Any) -> str:
    """Returns what is wrong and what to do, in one sentence or two."""
    if isinstance(error, _loaded("ray", "RayError")):
        mistake = _MISTAKE.search(str(error))  # of another process, which hands on its text alone
        return mistake[1] if mistake else f"{type(error).__name__}: {_first(str(error))}; see to it, {AGAIN}"
    if isinstance(error, _loaded("mlflow", "MlflowException")):
        reason = _first(getattr(error, "message", ""))
        where = "is the registry's address (registry.uri, or --registry) right, and does its server run?"
        return f"MLflow: {reason}; {where} {AGAIN.capitalize()}"
    if isinstance(error, OSError):
        path = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0, f"see to it, {AGAIN}")
        return f"{path}{error.strerror or _first(str(error))}; {remedy}"
    return f"{type(error).__name__}: {_first(str(error))}; see to it, {AGAIN}"


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:300]


def _log(error: BaseException, folder: Path | None) -> Path:
    """Writes the traceback; returns the file."""
    entry = f"{datetime.now(UTC).isoformat(timespec='seconds')}\n{''.join(traceback.format_exception(error))}\n"
    for path in (folder, Path(tempfile.gettempdir())):
        if path is None or not path.is_dir():
            continue
        file = path / (LOG if path == folder else f"pointsman-{os.getuid()}-{LOG}")
        try:
            with file.open("a", encoding="utf-8") as log:
                log.write(without_secrets(entry))
        except OSError:
            continue
        return file
    return Path("(no log: neither the run's folder nor the one for temporary files can be written to)")
