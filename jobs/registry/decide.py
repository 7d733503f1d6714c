"""Decides which version of a pool is in use, and gives what an earlier release registered its new names."""

from typing import Annotated

import typer

from jobs.registry.options import Json, Pool, RegistryUri, pool_model, print_json, registry
from pipeline.registry import migration, promotion


def promote(
    pool: Pool,
    version: Annotated[str, typer.Argument(help="Number of the version, or `latest`.")] = "latest",
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make a version the champion, whatever the gate says; `rollback` takes it back."""
    with registry(registry_uri) as terminal:
        name = pool_model(pool)
        before, now = promotion.champion(name), promotion.promote(name, version)
        if json:
            print_json({"model": name, "champion": int(now.version), "before": before and int(before.version)})
            return
        was = "" if before is None else f" (was version {before.version})"
        terminal.log(f"{name}@champion is version {now.version}{was}")


def rollback(pool: Pool, json: Json = False, registry_uri: RegistryUri = None) -> None:
    """Make the previous champion the champion again; a second rollback takes it back."""
    with registry(registry_uri) as terminal:
        name = pool_model(pool)
        before, now = promotion.champion(name), promotion.rollback(name)
        if json:
            print_json({"model": name, "champion": int(now.version), "before": before and int(before.version)})
            return
        terminal.log(
            f"{name}@champion is version {now.version}" + (f" (was version {before.version})" if before else "")
        )


def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    base: Annotated[str | None, typer.Option(help="Only this base; default: all.")] = None,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Give experts and pools of an earlier release their new names; nothing is copied, the former models stay."""
    with registry(registry_uri) as terminal:
        labels = [base] if base else migration.bases_to_migrate()
        log = (lambda text: None) if json else terminal.log
        moved = {label: migration.migrate(label, log=log, dry=dry_run) for label in labels}
        if json:
            print_json({"moved": moved, "dry_run": dry_run})
            return
        total = sum(moved.values())
        terminal.log(
            f"{total} versions {'would get' if dry_run else 'got'} their new names" if total else "nothing to do"
        )
