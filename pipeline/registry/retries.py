"""Retries while the registry, a server or a database, does not answer: detection, waiting and messages."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import without_secrets
from pipeline.errors import UserError
from pipeline.registry.databases import database_silence, is_database, without_driver

CHECK_SECONDS = 10.0
"""Seconds that a job waits for a server at its start: enough for one that starts beside it, short enough for a mistyped
address."""

_PROBE_SECONDS = 5
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_GATEWAY = {502, 503, 504}
_SERVER_ERRORS = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
_UNREACHED = "INTERNAL_ERROR"
"""MLflow's error code for a server that it could not reach; for a database it is a permanent error."""

REGISTRY_URI = "registry.uri"
"""Where jobs are told about their registry: a field of their configuration."""

T = TypeVar("T")


class RegistryError(UserError):
    """A wrong tracking address, name or version, or an unreachable server; the message names the remedy."""


class RegistryFailedError(RegistryError):
    """A registry that does not answer, fails or refuses: no mistake in the command, which may succeed later."""

    exit_code = 1


def fail_fast() -> None:
    """Keeps MLflow's client from retrying silently for minutes; an environment variable that is set stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def check_answers(setting: str = REGISTRY_URI) -> None:
    """Raises RegistryFailedError if MLflow's server or database does not answer within about CHECK_SECONDS.

    `setting` is where its address was given.
    """
    until = time.monotonic() + CHECK_SECONDS
    while (reason := _silence()) is not None:
        if time.monotonic() > until:
            what = "database" if is_database(mlflow.get_tracking_uri()) else "server"
            other = "without one, the registry is a file beside the output folder" if setting == REGISTRY_URI else ""
            raise RegistryFailedError(
                f"{setting}: {shown_uri()} does not answer: {reason}; start that {what} or correct the address"
                f"{f' ({other})' if other else ''}. Nothing that is finished is lost"
            )
        time.sleep(0.5)


def is_away(error: Exception) -> bool:
    """Returns whether an error means that the registry does not answer now, so that the same call may succeed later."""
    status = status_of(error)
    if isinstance(error, MlflowException):
        if status is not None and not _passes(status):
            return False
        return error.error_code in _SERVER_ERRORS or (error.error_code == _UNREACHED and _is_server())
    return isinstance(error, requests.RequestException) and (status is None or _passes(status))


def _passes(status: int) -> bool:
    """Returns whether another attempt may be answered otherwise."""
    return status in {429, 500, *_GATEWAY}


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status with which a server has answered; None where an error does not tell one."""
    if isinstance(error, MlflowException) and error.error_code in _REFUSALS:
        return _REFUSALS[error.error_code]
    if (response := getattr(error, "response", None)) is not None:
        return int(response.status_code)
    found = _STATUS.search(str(error))  # of several files, which MLflow gets side by side, the first
    return int(next(filter(None, found.groups()))) if found else None


_SYSTEM = re.compile(r"\[Errno -?\d+\] ([A-Za-z ]+)")
_BROKEN = {
    "Remote end closed connection": "it closed the connection",
    "Read timed out": "it did not answer in time",
    "SSLError": "it speaks no TLS, or its certificate is not trusted",
}
_STATUS = re.compile(
    r"failed with error code (\d{3})|too many (\d{3}) error responses|\b(\d{3}) (?:Client|Server) Error"
)
_DRIVER = re.compile(r"^\([\w.]+Error\) ")
"""What SQLAlchemy writes before the words of a database."""
_REFUSALS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's text, without secrets from addresses.

    For a failed connection it is the system's message, without urllib3's details, for a server's error its number.
    """
    if failed := _SYSTEM.search(str(error)):
        return failed[1].lower()
    if (status := status_of(error)) is not None and status not in _REFUSALS.values():
        return f"it answers {status}"
    if broken := next((words for said, words in _BROKEN.items() if said in str(error)), None):
        return broken
    if isinstance(error, SQLAlchemyError):
        return without_driver(error)
    lines = [line.strip() for line in _DRIVER.sub("", str(error)).splitlines() if line.strip()]
    return without_secrets(lines[0])[:300] if lines else type(error).__name__


@dataclass(frozen=True)
class Retries:
    """Retries calls that the registry did not answer for up to `seconds`, with messages to `notify`."""

    seconds: float
    notify: Callable[[str], None]

    def __call__(self, action: Callable[[], T], what: str, *, kept: str = "") -> T:
        """Returns the result of `action`, which must be idempotent; `what` names it in messages.

        Raises RegistryError after `seconds`; `kept` then tells what is safe and where. Other errors pass.
        """
        began, attempt = time.monotonic(), 1
        while True:
            reason = _silence()
            if reason is None:
                try:
                    return action()
                except (MlflowException, requests.RequestException) as error:
                    if not is_away(error):
                        raise
                    reason = reason_of(error)
            passed = time.monotonic() - began
            if passed >= self.seconds:
                raise RegistryFailedError(
                    f"{what}: {shown_uri()} did not answer {attempt} times in {passed:.0f} s "
                    f"(registry.retry_seconds): {reason}"
                    + (f"\n    {kept}" if kept else "")
                    + "\n    repair the registry, then run the same command again: it goes on from here"
                )
            pause = min(_PAUSES[min(attempt, len(_PAUSES)) - 1], self.seconds - passed)
            self.notify(
                f"  {what}: the registry does not answer (attempt {attempt}: {reason}); again in {pause:.0f} s, "
                f"for {self.seconds - passed:.0f} s at most"
            )
            time.sleep(pause)
            attempt += 1


def _silence() -> str | None:
    """Returns why MLflow's server or database does not answer; None if it does, or if the registry is a file."""
    if is_database(uri := mlflow.get_tracking_uri()):
        return database_silence(uri)
    if not _is_server():
        return None
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=0,
            timeout=_PROBE_SECONDS,
            raise_on_status=False,
        )
    except MlflowException as error:
        return reason_of(error)
    # Any other answer counts: a server without /health, or one that asks for a password there, is up.
    return f"it answers {answer.status_code} {answer.reason}" if answer.status_code in _GATEWAY else None


def is_silent() -> bool:
    """Returns whether MLflow's server or database does not answer now."""
    return _silence() is not None


def _is_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://"))


def shown_uri() -> str:
    """Returns the address of the registry in use, without secrets."""
    return without_secrets(mlflow.get_tracking_uri())
