"""New Python environments, and what runs in them without seeing this project."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import requests

from pipeline.errors import UserError

PATIENCE = 180
"""Seconds for which a server may start."""


class EnvironmentFailedError(UserError):
    """Something that failed in a new environment; the message holds the end of what it printed."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path
    seconds: float
    """What making it took."""

    def run(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
        """Runs a program of the environment, in its folder; raises EnvironmentFailedError with the end of its output."""
        with log.open("w") as file:
            done = subprocess.run(
                [str(self.folder / "bin" / command[0]), *command[1:]],
                cwd=self.folder, env=self._variables(variables or {}), stdout=file, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if done.returncode:
            end = " ".join(log.read_text(errors="replace").splitlines()[-5:])
            raise EnvironmentFailedError(f"{command[0]} failed in {self.folder} ({log}): {end}")

    @contextmanager
    def serving(self, model: str, log: Path, variables: Mapping[str, str]) -> Iterator[str]:
        """Serves a registered model on this machine's loopback; yields its address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["models", "serve", "-m", model, "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
        with log.open("w") as file:
            server = subprocess.Popen(
                [str(self.folder / "bin" / "mlflow"), *command],
                cwd=self.folder, env=self._variables(variables), stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_for(server, address, log)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its workers too
            server.wait(PATIENCE)

    def _variables(self, more: Mapping[str, str]) -> dict[str, str]:
        """Returns this process's environment without what leads to this project, its own programs first."""
        kept = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        return {**kept, "PATH": f"{self.folder / 'bin'}{os.pathsep}{kept['PATH']}", **more}


def new_environment(folder: Path, requirements: Sequence[str], log: Path) -> Environment:
    """Makes an environment anew that holds these packages and what they need."""
    began = monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    made = Environment(folder, 0.0)
    made.run(["pip", "install", "--quiet", *requirements], log)
    return Environment(folder, monotonic() - began)


def _wait_for(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    began = monotonic()
    while monotonic() - began < PATIENCE and server.poll() is None:
        try:
            if requests.get(f"{address}/ping", timeout=5).ok:
                return
        except requests.ConnectionError:
            sleep(1)
    raise EnvironmentFailedError(f"mlflow models serve did not answer within {PATIENCE} s; see {log}")
