"""Errors of data: bad rows, unreadable parts of files, unusable sources; and safe excerpts of any text.

Independent of file formats.
"""

from dataclasses import dataclass

from pipeline.errors import UserError

SHOWN = 300
"""Characters of a bad row that the quarantine file shows."""


class BadRow(ValueError):
    """A row that cannot be used; the quarantine file records the message as its reason."""


class StreamError(UserError):
    """Data that is missing or unusable; the message names path and remedy."""


@dataclass(frozen=True)
class UnreadableRow:
    """Placeholder for a row, or for several rows, that could not be read from a file."""

    reason: str
    excerpt: str = ""
    """Beginning of the unreadable text."""
    lost: str = ""
    """Unreadable part of the file, such as `all rows beyond row 7`; empty for a single row."""
    rows: int = 1
    """Number of rows it stands for; 0 if unknown."""


def printable(text: str, limit: int = SHOWN) -> str:
    """Returns the beginning of a text as valid Unicode: bytes that were not UTF-8 and half surrogates become `?`."""
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def first_line(error: BaseException, limit: int = SHOWN) -> str:
    """Returns the first line of an error's message; libraries add details on further lines."""
    return printable((str(error) or type(error).__name__).splitlines()[0], limit)
