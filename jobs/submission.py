"""Submitting a command to a Ray cluster: what travels with it, what its job is called, and what the user sees of it.

- The configuration travels as one file, whatever it extends and whatever overrides change; so no word of a command that
  everybody reads in the list of jobs holds a setting.
- Relative paths name files here, and travel. Absolute ones and URIs name places that the cluster reads itself.
- A job is called after its command and run: the same one submitted twice is one job.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath
from typing import Any, NoReturn

import typer
import yaml

from cluster.environment import FILE, to_bytes, travelling
from cluster.package import MIB, Package, bytes_of
from jobs.row_images import images_beside
from jobs.submit_options import submit_options
from pipeline.config import Config, ConfigError, digest, holds_secrets, read_values, with_paths, without_secrets
from pipeline.config.loading import field_path
from pipeline.errors import UserError
from pipeline.provenance import COMMIT, git_commit

DIRECTORY = "files"
"""Folder of the package that holds what was named by relative paths."""


class JobFiles:
    """The files that travel with a command."""

    def __init__(self) -> None:
        self.package, self.limit = Package(), bytes_of(submit_options().package_limit)
        self.settings: list[Any] = []
        """Whatever distinguishes this job from another one of the same run."""

    def path(self, path: str) -> str:
        """Packs what a relative path or pattern names here, with the images that it names; returns its name in the job."""
        if not path or "://" in path or path == "tiny" or path.startswith(("/", "~")):
            return path
        found = [Path(path)] if Path(path).exists() else sorted(Path().glob(path))
        for each in found:
            self.package.add(each, _place(str(each)))
            for image in images_beside(each) if each.is_file() and each.stat().st_size <= self.limit else ():
                self.package.add(image, _place(str(image)))
        return _place(path) if found else path

    def text(self, file: Path, folder: str) -> str:
        """Packs a small file of settings, wherever it lies, into `folder`; returns its name in the job."""
        content = file.read_text()
        self.settings.append(content)
        self.package.write(f"{folder}/{file.name}", content.encode())
        return f"{folder}/{file.name}"

    def config(self, file: Path, overrides: Sequence[str], config_class: type[Config]) -> str:
        """Packs a configuration with what it extends, overrides and files; returns its name in the job."""
        values = with_paths(read_values(file, overrides, config_class), config_class, self.path)
        self.package.write(file.name, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
        self.settings.append(values)
        return file.name

    def override(self, text: str, config_class: type[Config]) -> str:
        """Packs the file that FIELD=VALUE names, if it names one; returns the word for the job."""
        values = read_values(None, [text], config_class)
        changed: Any = with_paths(values, config_class, self.path)
        if changed == values:
            return text
        key = text.partition("=")[0].strip()
        for part in field_path(key, config_class).split("."):
            changed = changed[part]
        return f"{key}={json.dumps(changed)}"


def _place(path: str) -> str:
    """Returns where a relative path lies in the package."""
    return normpath(f"{DIRECTORY}/{normpath(path).replace('..', 'up')}")


AT_HOME = "--at-home"
"""First word of a job whose relative paths lie below HOME, since its working directory does not last."""

HOME = Path("~/pointsman")
"""Folder on the head for what relative paths of submitted jobs name."""


def submit_command(
    words: Sequence[str],
    typed: Sequence[str],
    address: str,
    files: JobFiles,
    *,
    run: str,
    output: str,
    key: Sequence[str] = (),
) -> NoReturn:
    """Submits the `words` of a command as the job of a `run` in `output`, and ends with the job's exit code.

    `typed` are the words as the user gave them, for the list of jobs; `key` what else distinguishes runs.
    """
    if exposed := next(filter(holds_secrets, words), None):
        raise ConfigError(
            f"{without_secrets(exposed)!r}: it holds a key, which every user of the cluster could read in the list of jobs; "
            "leave it out and give it through the environment, which travels unseen (a registry as MLFLOW_TRACKING_URI)"
        )
    options, package, commit = submit_options(), files.package, git_commit() or ""
    variables = travelling(options.env, options.env_file)
    package.add_code()
    package.write(COMMIT, commit.encode())
    if variables:
        package.write(FILE, to_bytes(variables), mode=0o600)
    package.check(files.limit)

    from cluster.client import connected  # with Ray, which a mistake above does not wait for
    from cluster.submit import SETTINGS, follow, submit

    shown, client = without_secrets(address), connected(address)
    submitted = submit(
        client,
        address,
        entrypoint=["python", "-m", "jobs", *words],
        name=_name(f"{typed[0]}-{run}-{digest(typed[0], run, without_secrets(output), list(key))[:6]}"),
        package=package,
        metadata={
            "command": without_secrets(shlex.join(["pointsman", *typed])),
            "run": run,
            "output": without_secrets(output),
            "commit": commit,
            SETTINGS: digest(list(words), files.settings),
        },
    )
    if submitted.attached:
        typer.echo(f"{submitted.submission_id} runs at {shown} already; attached to it")
    else:
        size = f"{len(package.sizes)} files, {submitted.package_bytes / MIB:.1f} MiB"
        typer.echo(f"submitted {submitted.submission_id} to {shown} ({size})")
        if variables:
            typer.echo(f"environment: {', '.join(sorted(variables))}")
    if options.detach:
        typer.echo(f"come back: pointsman jobs attach {submitted.submission_id} --address {shown}")
        sys.exit(0)
    job = follow(client, address, submitted.submission_id)
    if job.exit_code not in (0, UserError.exit_code):
        end = f"{job.submission_id} {job.status}, exit code {job.exit_code}"
        typer.echo(f"{end}; the same command goes on from there", err=True)
    sys.exit(job.exit_code)


def _name(text: str) -> str:
    """Returns a text as part of a URL."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)


def submit_words(command: Sequence[str], words: Sequence[str], address: str) -> NoReturn:
    """Submits a command as it is typed; its paths are those of the head, relative ones below HOME."""
    typed = [*command, *words]
    submit_command([AT_HOME, *typed], typed, address, JobFiles(), run=command[-1], output=str(HOME), key=words)
