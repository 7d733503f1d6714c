"""Decides which version of a pool is in use, and gives what an earlier release registered its new names."""

from typing import Annotated

import typer

from jobs.registry.options import Json, Pool, RegistryUri
from jobs.registry.reaching import pool_model, registry
from jobs.terminal import print_json
from pipeline.registry import migration, promotion


def promote(
    pool: Pool,
    version: Annotated[str, typer.Argument(help="Number of the version, or `latest`.")] = "latest",
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make a version the champion, whatever the gate says; `rollback` takes it back.

    It is first looked at whether everything that it names is there.
    """
    with registry(registry_uri) as terminal:
        name = pool_model(pool)
        with promotion.deciding(name):
            before, now = promotion.champion(name), promotion.promote(name, version)
        number = int(now.version)
        if json:
            print_json({"model": name, "champion": number, "before": before and int(before.version)})
        elif before is not None and int(before.version) == number:
            terminal.log(f"{name}@champion is version {number} already")
        else:
            was = "" if before is None else f" (was version {before.version})"
            terminal.log(f"{name}@champion is version {number}{was}")


def rollback(pool: Pool, json: Json = False, registry_uri: RegistryUri = None) -> None:
    """Make the champion before the present one the champion again; a second rollback takes it back."""
    with registry(registry_uri) as terminal:
        name = pool_model(pool)
        with promotion.deciding(name):
            before, now = promotion.champion(name), promotion.rollback(name)
        if json:
            print_json({"model": name, "champion": int(now.version), "before": before and int(before.version)})
            return
        was = f" (was version {before.version})" if before else ""
        terminal.log(f"{name}@champion is version {now.version}{was}")


def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    base: Annotated[str | None, typer.Option(help="Only this base; default: all.")] = None,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Give experts and pools of an earlier release their new names; nothing is copied, the former models stay.

    Accuracies and samples come to their pages when `pointsman learn` runs again, which trains nothing for that.
    """
    with registry(registry_uri) as terminal:
        moves = []
        for label in migration.bases_to_migrate(base):
            for step in migration.migrate(label, dry=dry_run):
                moves.append(step.to_json())
                if not json:
                    terminal.log(f"  {step}")
        if json:
            print_json({"moves": moves, "dry_run": dry_run})
            return
        done = "would get their new names" if dry_run else "got their new names"
        terminal.log(f"{len(moves)} versions {done}" if moves else "nothing to do")
