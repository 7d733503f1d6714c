"""Deletes what no pool needs, after showing it."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from jobs.registry.options import Json, RegistryUri
from jobs.registry.reaching import registry
from jobs.terminal import print_json, table
from pipeline.registry.garbage import Garbage, find_garbage, remove


def gc(
    older_than: Annotated[
        float, typer.Option(help="Hours; what is younger may be on its way into a pool.", min=0)
    ] = 24.0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Show uploads without a version, experts and statistics of base prompts that no pool refers to; delete them if confirmed.

    MLflow keeps the files of what is deleted until `mlflow gc`.
    """
    with registry(registry_uri) as terminal:
        found = find_garbage(hours=older_than)
        rows = [(each, each.bytes) for each in found]
        if json:
            gone = _remove(rows, older_than) if yes else []
            shown = [{"name": each.name, "why": each.why, "bytes": size} for each, size in rows]
            print_json({"found": shown, "deleted": len(gone)})
            return
        if not found:
            terminal.log(
                f"nothing: every upload has a version, every expert is in a pool, or is younger than {older_than:g} h"
            )
            return
        lines = [
            [
                each.name,
                each.why,
                f"{datetime.fromtimestamp(each.created, UTC):%Y-%m-%d %H:%M}",
                f"{size / 2**20:.1f} MiB",
            ]
            for each, size in rows
        ]
        terminal.show(table(f"{len(found)} that no pool needs", ["what", "why", "created (UTC)", "size"], lines))
        if yes or typer.confirm("delete them?"):
            gone = _remove(rows, older_than)
            kept = f", {len(found) - len(gone)} kept, which are needed by now" if len(gone) < len(found) else ""
            terminal.log(f"{len(gone)} deleted{kept}; `mlflow gc` frees their {sum(gone) / 2**20:.1f} MiB")


def _remove(rows: list[tuple[Garbage, int]], older_than: float) -> list[int]:
    """Deletes what is garbage still: a pool may have come to need it meanwhile. Returns the bytes of each."""
    still = {each.name for each in find_garbage(hours=older_than)}
    return [size for each, size in rows if each.name in still and remove(each)]
