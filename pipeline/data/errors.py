"""What is wrong with data: a row, a part of a file, a whole source; and texts that can be shown whatever they hold.

Knows nothing of formats.
"""

from dataclasses import dataclass

from pipeline.errors import UserError

SHOWN = 300
"""Characters of a bad row that the quarantine file shows."""


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason that goes into the quarantine file."""


class StreamError(UserError):
    """Data that cannot be found or used; the message names path and remedy."""


@dataclass(frozen=True)
class UnreadableRow:
    """What stands in the place of a row that could not be read from its file, or of more than a row."""

    reason: str
    excerpt: str = ""
    """Beginning of what stands there."""
    lost: str = ""
    """What of the file cannot be read, such as `all rows beyond row 7`; empty where it is one row."""
    rows: int = 1
    """Rows that stand there; 0 where no one knows how many."""


def printable(text: str, limit: int = SHOWN) -> str:
    """Returns the beginning of a text as valid Unicode: bytes that were not UTF-8 and half surrogates become `?`."""
    return text[:limit].encode("utf-8", "replace").decode("utf-8")


def first_line(error: BaseException, limit: int = SHOWN) -> str:
    """Returns what an error says, without the details that libraries add on further lines."""
    return printable((str(error) or type(error).__name__).splitlines()[0], limit)
