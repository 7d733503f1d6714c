"""Files and folders that are replaced as a whole: written beside their place, put there by renaming."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


def user_cache(name: str) -> Path:
    """Returns this user's folder for copies that can be fetched again: $XDG_CACHE_HOME/pointsman/<name>, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pointsman" / name


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields where to write a file that replaces `target` when the context ends; after an error `target` is untouched.

    Of several processes that write the same file the last one stays. Makes the folder if need be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid4().hex}")  # hidden: whoever lists the folder does not see it
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file, all of it or nothing."""
    with atomic_file(file) as staging:
        staging.write_text(json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `target` when the context ends; after an error it is gone, `target` untouched.

    A process that is killed leaves the old folder or the new one, at every moment (see `current_folder`). One process at a
    time may write a folder; locks are the caller's affair.
    """
    staging = target.with_name(target.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Renames the folder `new`, on the same file system, to `target`, and removes the folder that was there."""
    old = _old(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def current_folder(target: Path) -> Path:
    """Returns where the folder `target` is: under its name, or beside it where a kill between two renamings left it."""
    return _old(target) if not target.exists() and _old(target).exists() else target


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")
