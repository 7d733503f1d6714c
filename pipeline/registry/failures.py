"""What a registry that fails in the middle of a command says: one line with its address, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
import requests
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.registry.retries import RegistryFailedError, is_away, reason_of, shown_uri, status_of


@contextmanager
def registry_failures() -> Iterator[None]:
    """Turns what a registry that is away, fails or refuses makes MLflow raise into a RegistryFailedError; other errors pass."""
    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        if (failure := failure_of(error)) is None:
            raise
        raise failure from error


def failure_of(error: Exception) -> RegistryFailedError | None:
    """Returns what a user needs to know of an error; None if it is not the registry that fails or refuses."""
    if isinstance(error, requests.RequestException) and not _is_of_registry(error):
        return None
    status = status_of(error)
    if status == 401:
        return RegistryFailedError(
            f"{shown_uri()} asks for a user and a password, or knows not those given (401); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )
    if status == 403:
        return RegistryFailedError(
            f"{shown_uri()} does not permit this to this user (403: {reason_of(error)}); ask whoever runs it for the "
            "permission, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for another user"
        )
    if is_away(error) or isinstance(error, SQLAlchemyError):
        return RegistryFailedError(
            f"{shown_uri()} fails: {reason_of(error)}; when it answers again, run the same command again: whatever is there "
            "is complete"
        )
    return None


def _is_of_registry(error: requests.RequestException) -> bool:
    asked = getattr(error.request, "url", None) or getattr(error.response, "url", None) or ""
    return str(asked).startswith(mlflow.get_tracking_uri())
