"""Retries while the registry does not answer: detection, waiting and messages."""

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

from pipeline.config import without_secrets
from pipeline.errors import UserError

CHECK_SECONDS = 10.0
"""Seconds that a job waits for a server at its start: enough for one that starts beside it, short enough for a mistyped
address."""

_PROBE_SECONDS = 5
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_GATEWAY = {502, 503, 504}
_SERVER_ERRORS = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
_UNREACHED = "INTERNAL_ERROR"
"""MLflow's error code for a server that it could not reach; for a database it is a permanent error."""

T = TypeVar("T")


class RegistryError(UserError):
    """A wrong tracking address, name or version, or an unreachable server; the message names the remedy."""


def fail_fast() -> None:
    """Keeps MLflow's client from retrying silently for minutes; an environment variable that is set stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def check_server() -> None:
    """Raises RegistryError if MLflow's server does not answer within about CHECK_SECONDS."""
    until = time.monotonic() + CHECK_SECONDS
    while (reason := _silence()) is not None:
        if time.monotonic() > until:
            raise RegistryError(
                f"registry.uri: {_shown_uri()} does not answer: {reason}; start that server or correct the address "
                "(without one, the registry is a file beside the output folder). Nothing that is finished is lost"
            )
        time.sleep(0.5)


def is_away(error: MlflowException | requests.RequestException) -> bool:
    """Returns whether an error means that the registry does not answer now, so that the same call may succeed later."""
    if isinstance(error, MlflowException):
        return error.error_code in _SERVER_ERRORS or (error.error_code == _UNREACHED and _is_server())
    return error.response is None or error.response.status_code in {429, 500, *_GATEWAY}


_SYSTEM = re.compile(r"\[Errno -?\d+\] ([A-Za-z ]+)")


def reason_of(error: Exception) -> str:
    """Returns the first line of an error's text, without secrets from addresses.

    For a failed connection it is the system's message, without urllib3's details.
    """
    if failed := _SYSTEM.search(str(error)):
        return failed[1].lower()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
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
                raise RegistryError(
                    f"{what}: {_shown_uri()} did not answer {attempt} times in {passed:.0f} s "
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
    """Returns why MLflow's server does not answer; None if it does, or if the registry is a file."""
    if not _is_server():
        return None
    try:
        answer = http_request(
            get_default_host_creds(mlflow.get_tracking_uri()),
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
    """Returns whether MLflow's server does not answer now."""
    return _silence() is not None


def _is_server() -> bool:
    return mlflow.get_tracking_uri().startswith(("http://", "https://"))


def _shown_uri() -> str:
    return without_secrets(mlflow.get_tracking_uri())
