"""Decides which version of a pool is in use, and gives what an earlier release registered its new names."""

from typing import Annotated

import typer

from jobs.registry.options import Json, RegistryUri, print_json, registry
from pipeline.registry import migration, promotion
from pipeline.registry.browsing import meant
from pipeline.registry.experts import EVALUATED, REGISTERED
from pipeline.registry.names import read_name
from pipeline.registry.pools import retire_expert
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import log_scores, scores_of, tags_of
from pipeline.registry.tracking import run_beside
from pipeline.registry.versions import MODELS, describe

Pool = Annotated[str, typer.Argument(help="Registered model of the pool, e.g. tiny.pool.demo.")]


def promote(
    pool: Pool,
    version: Annotated[str, typer.Argument(help="Number of the version, or `latest`.")] = "latest",
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make a version the champion, whatever the gate says; the champion before it stays as alias `previous`."""
    with registry(registry_uri) as terminal:
        name = _pool(pool)
        before, now = promotion.champion(name), promotion.promote(name, version)
        if json:
            print_json({"model": name, "champion": int(now.version), "before": before and int(before.version)})
            return
        was = "" if before is None else f" (was version {before.version})"
        terminal.log(f"{name}@champion is version {now.version}{was}")


def rollback(pool: Pool, json: Json = False, registry_uri: RegistryUri = None) -> None:
    """Make the previous champion the champion again; a second rollback takes it back."""
    with registry(registry_uri) as terminal:
        name = _pool(pool)
        before, now = promotion.champion(name), promotion.rollback(name)
        if json:
            print_json({"model": name, "champion": int(now.version), "before": before and int(before.version)})
            return
        terminal.log(
            f"{name}@champion is version {now.version}" + (f" (was version {before.version})" if before else "")
        )


def retire(
    pool: Pool,
    expert: Annotated[str, typer.Argument(help="Task of the expert.")],
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make a version of the pool in use in which the base answers in place of an expert, and make it the champion.

    Who answers other prompts stays as it is. Without a champion, the newest version is the one that changes; nothing is
    promoted then. `pointsman registry rollback` takes it back.
    """
    with registry(registry_uri) as terminal:
        name = _pool(pool)
        before, in_use = meant(name), promotion.champion(name)
        with run_beside(before, f"retire {expert}") as run_id:
            now = retire_expert(before, expert)
            kept = [score for score in scores_of(before) if score.dataset != expert]
            log_scores(run_id, now, kept)
            describe(now, tags={**tags_of(kept), "status": EVALUATED if kept else REGISTERED})
        if in_use is not None:
            promotion.promote(name, str(now.version))
        if json:
            print_json(
                {"model": name, "version": int(now.version), "before": int(before.version), "champion": bool(in_use)}
            )
            return
        place = "is champion now" if in_use is not None else "is the newest; there is no champion"
        terminal.log(f"{name} version {now.version}, version {before.version} without {expert}, {place}")


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


def _pool(name: str) -> str:
    """Returns the registered model of a pool; raises RegistryError for another one."""
    model = name.removeprefix(MODELS)
    named = read_name(model)
    if named is None or named.kind != "pool":
        raise RegistryError(
            f"{name!r} is no pool; pools are called <base>.pool.<name>: pointsman registry list --kind pool"
        )
    return model
