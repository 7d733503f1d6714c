"""The ancestor of every error that a user can mend, and how stored files are read so that a damaged one is such an error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(ValueError):
    """What a user can mend; the message names file or field, and the remedy. Jobs show it without a traceback."""

    exit_code = 2
    """With which a command ends."""


class StoredFileError(UserError):
    """A file of a run that is missing, damaged or of another version; the message names it and what to do."""


@contextmanager
def stored_file(file: Path, remedy: str, kind: type[UserError] = StoredFileError) -> Iterator[None]:
    """Turns what reading `file` raises into a `kind` that names the file, the reason and `remedy`.

    For files that this project has written: JSON, pydantic models, safetensors. A UserError passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise kind(f"{file}: missing; {remedy}") from None
    except OSError as error:
        raise kind(f"{file}: cannot be read: {error.strerror or error}; {remedy}") from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()
        raise kind(f"{file}: damaged, or of another version: {' '.join(reason[:3])}; {remedy}") from None
