"""The error of answering in bulk."""

from pipeline.errors import UserError


class PredictError(UserError):
    """A folder or a setting that does not fit the answers; the message names it and the remedy."""
