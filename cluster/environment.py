"""The environment that a user gives a submitted job: values travel in a file of the job's package, names alone are shown.

Ray shows the `env_vars` of a job to everybody who sees its list of jobs or its dashboard, and keeps them in its logs. A file of
the package is shown nowhere: the head has it in the memory of its control store, and every node of the job in a folder of
Ray's session, readable by the user alone that Ray runs as (0600). Whoever may submit jobs to the same cluster runs as that
user, and can read it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dotenv import dotenv_values

from pipeline.errors import UserError

FILE = ".pointsman-environment.json"
"""The file, at the root of the package, beside the code."""

HOOK = "cluster.environment.apply"
"""What every worker of a job calls first."""

ALWAYS = ("MLFLOW_TRACKING_URI", "HF_HOME")
"""Variables that travel unasked, where they are set: where the registry is, and where models are."""

HERE = ("sqlite:", "file:", "/", ".")
"""How a registry's address begins that names a file on this machine."""


class VariableError(UserError):
    """A variable that is to travel is not there; the message says where it was looked for."""


def travelling(names: Sequence[str], file: Path | None = None, *, dotenv: Path = Path(".env")) -> dict[str, str]:
    """Returns the variables of a job: all of `file`, those `names` from this environment, else from `dotenv`, and ALWAYS."""
    values = {name: os.environ[name] for name in ALWAYS if os.environ.get(name)}
    if values.get(ALWAYS[0], "").startswith(HERE):
        del values[ALWAYS[0]]
    if file is not None:
        if not file.is_file():
            raise VariableError(f"--env-file {file}: no such file")
        values |= _read(file)
    beside = _read(dotenv) if dotenv.is_file() else {}
    for name in names:
        if "=" in name:
            raise VariableError(
                f"--env {name.partition('=')[0]}=...: give the name alone; its value comes from the environment or from .env, "
                "so that it stands in no list of processes"
            )
        value = os.environ.get(name, beside.get(name))
        if value is None:
            raise VariableError(f"--env {name}: neither this environment nor .env has it; export it first")
        values[name] = value
    return values


def _read(file: Path) -> dict[str, str]:
    return {name: value for name, value in dotenv_values(file).items() if value is not None}


def to_bytes(values: Mapping[str, str]) -> bytes:
    """Returns the content of FILE."""
    return json.dumps(dict(values)).encode()


def is_given(root: Path | None = None) -> bool:
    """Whether the code that runs lies in a package with an environment."""
    return _file(root).is_file()


def apply(root: Path | None = None) -> None:
    """Sets the variables of the package, in whichever process of the job; HF_HOME only where there is such a folder."""
    if not is_given(root):
        return
    values: dict[str, str] = json.loads(_file(root).read_text())
    home = values.get("HF_HOME")
    if home is not None and not Path(home).is_dir():
        del values["HF_HOME"]
    os.environ.update(values)


def _file(root: Path | None) -> Path:
    return (root or Path(__file__).parents[1]) / FILE
