"""Opens MLflow's pages on the local registry: experts, pools, runs, curves, reports.

python -m jobs.ui --output runs
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import user_errors
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import check_database, ui_command


def main(
    output: Annotated[Path, typer.Option(help="Folder of the runs, with mlflow.db in it.")] = Path("runs"),
) -> None:
    """Browse experts, pools and runs in MLflow at http://127.0.0.1:5000 (loopback only)."""
    with user_errors():
        database = output.resolve() / "mlflow.db"
        if not database.is_file():
            raise RegistryError(
                f"{database} does not exist yet; `pointsman learn` makes it (or name its folder: --output)"
            )
        check_database(database)
        command = ui_command(f"sqlite:///{database}")
        typer.echo(f"{' '.join(command)}")
        # By this environment's Python: the environment need not be activated.
        os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    typer.run(main)
