"""Claims on what lies unused in the registry: a registration takes it up, or `gc` deletes it, never both.

Each side writes its own mark on the logged model first and looks for the other's afterwards, so whichever comes second sees the
first: a registration leaves alone what is being deleted, and registers it anew; a deletion spares what was taken up.
No locks, so it works on a server too.
"""

from time import time

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

TAKEN_UP = "pointsman.taken_up"
"""Tag of a logged model: when a registration last relied on it (milliseconds since 1970), while no version refers to it yet."""

DELETING = "pointsman.deleting"
"""Tag of a logged model that is about to be deleted."""


def take_up(model_id: str) -> bool:
    """Marks a logged model as needed; returns whether it can be relied on: False where it is gone, or is being deleted."""
    try:
        _mark(model_id, TAKEN_UP, str(round(time() * 1000)))
        return not is_being_deleted(MlflowClient().get_logged_model(model_id))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return False


def is_being_deleted(model: LoggedModel) -> bool:
    """Whether a logged model, as it was read, must not be relied on any more."""
    return DELETING in model.tags


def last_needed(model: LoggedModel) -> float:
    """Returns when a logged model was made or last taken up, in seconds since 1970."""
    return max(model.creation_timestamp, int(model.tags.get(TAKEN_UP, 0))) / 1000


def may_delete(model: LoggedModel) -> bool:
    """Marks a logged model as being deleted, unless a registration has taken it up since `model` was read.

    Returns whether it may go. Raises MlflowException where it is gone already.
    """
    client = MlflowClient()
    _mark(model.model_id, DELETING, "true")
    if client.get_logged_model(model.model_id).tags.get(TAKEN_UP) == model.tags.get(TAKEN_UP):
        return True
    client.delete_logged_model_tag(model.model_id, DELETING)
    return False


def _mark(model_id: str, tag: str, value: str) -> None:
    try:
        MlflowClient().set_logged_model_tags(model_id, {tag: value})
    except MlflowException as error:  # "invalid parameter", whatever MLflow met when it looked for the model
        raise error.__cause__ or error from None
