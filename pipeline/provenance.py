"""Provenance: which command, code and versions made a summary."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config import without_secrets

PACKAGES = ("torch", "ray", "transformers", "peft", "deepspeed", "mlflow", "pyarrow")
"""Packages whose versions may change a result."""

COMMIT = ".pointsman-commit"
"""File beside the packages of a submitted job that names the commit of its code."""

COMMAND = "POINTSMAN_COMMAND"
"""Environment variable with the command as it was typed, where another one was started for it."""


def provenance(
    name: str, started: datetime, *, seed: int | None = None, packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """Returns what every `summary.json` begins with: name, command line, seed (if there is one), commit, start, versions."""
    return {
        "name": name,
        "command": command_line(),
        **({} if seed is None else {"seed": seed}),
        "git_commit": git_commit(),
        "started": started.isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in packages},
    }


def now() -> datetime:
    """Returns the time in UTC."""
    return datetime.now(UTC)


def command_line() -> str:
    """Returns the command as the user typed it, without secrets."""
    here = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return without_secrets(os.environ.get(COMMAND) or here)


COMMIT_VARIABLE = "POINTSMAN_COMMIT"
"""Environment variable with the commit of the code in an image, which holds no history."""


def git_commit() -> str | None:
    """Returns the commit of the code: of the checkout that a submitted job came from, of the image, or of this checkout."""
    here = Path(__file__).parent
    if (noted := here.parent / COMMIT).is_file():
        return noted.read_text().strip() or None
    if commit := os.environ.get(COMMIT_VARIABLE):
        return commit
    answer = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
