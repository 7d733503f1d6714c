"""Opens MLflow's pages on the local registry: experts, pools, runs, curves, reports.

python -m jobs.ui --output runs --port 5000
"""

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.lazy import run_alone
from pipeline.config import without_secrets
from pipeline.registry.addresses import LOOPBACK, SERVERS, UI_PORT, UI_URI, ui_command
from pipeline.registry.databases import is_database
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import use_registry


def main(
    output: Annotated[Path, typer.Option(help="Folder of the runs, with mlflow.db in it.")] = Path("runs"),
    registry: Annotated[
        str | None,
        typer.Option(
            help="A registry elsewhere: sqlite:///<file>, a database (postgresql://, mysql+pymysql://), or a server, whose "
            "address is printed. Default: that of --output."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback reach the network.")] = LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = UI_PORT,
) -> None:
    """Browse experts, pools and runs in MLflow, by default at http://127.0.0.1:5000 (loopback only)."""
    with user_errors():
        uri = registry or f"sqlite:///{output.resolve() / 'mlflow.db'}"
        use_registry(uri, "--registry")
        if uri.startswith(SERVERS):
            typer.echo(f"open {without_secrets(uri)} in a browser: a server shows its own pages")
            return
        command = ui_command(uri, host=host, port=port)
        _check_address(host, port)
        if not host.startswith("127.") and host not in ("localhost", "::1"):
            typer.echo(f"whoever reaches {host}:{port} can change this registry: it asks for no password")
        typer.echo(f"{' '.join(command)}")
        if is_database(uri):
            os.environ[UI_URI] = uri
        # By this environment's Python: the environment need not be activated.
        os.execv(sys.executable, [sys.executable, "-m", *command])


def _check_address(host: str, port: int) -> None:
    """Raises RegistryError where nothing can listen."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise RegistryError(f"{host}:{port}: {error.strerror or error}; choose another --port or --host") from None


if __name__ == "__main__":
    run_alone(main)
