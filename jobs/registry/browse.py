"""Looks at the registry."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from jobs.registry.options import Json, RegistryUri, Version
from jobs.registry.reaching import registry
from jobs.terminal import print_json, table
from pipeline.registry.browsing import difference, listed, meant, shown
from pipeline.registry.migration import bases_to_migrate, waiting_for_migration


class ModelKind(StrEnum):
    """What can be listed."""

    POOL = "pool"
    EXPERT = "expert"
    BASE = "base"


def list_models(
    kind: Annotated[ModelKind | None, typer.Option(help="Only these.")] = None,
    base: Annotated[str | None, typer.Option(help="Only those of this base.")] = None,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """List pools, experts and bases with accuracy and status of the pool's version in use, else of the newest version."""
    with registry(registry_uri) as terminal:
        found = listed(kind.value if kind else None, base)
        if json:
            print_json([asdict(each) for each in found])
            return
        waiting = [waiting_for_migration(label) for label in bases_to_migrate()]
        rows = [
            [
                *(each.model, str(each.latest), str(each.champion or ""), str(each.tagged)),
                *(each.tags.get(tag, "") for tag in _TAGS),
            ]
            for each in found
        ]
        count = f"{len(found)} model" + "s" * (len(found) != 1)
        terminal.show(table(count, ["model", "latest", "champion", "of version", *_TAGS], rows))
        for what in filter(None, waiting):
            terminal.log(f"{what}, which `pointsman registry migrate` gives new names")


MOVED = 20
"""Most prompts that change hands in a table."""

_TAGS = ("accuracy", "base_kept", "rank", "rows", "status")


def show(version: Version, json: Json = False, registry_uri: RegistryUri = None) -> None:
    """Show a version: its tags, accuracies by task and base ability, experts, and what it was made from."""
    with registry(registry_uri) as terminal:
        found = shown(meant(version))
        if json:
            print_json(found.to_json())
            return
        aliases = "".join(f"  @{alias}" for alias in found.aliases)
        terminal.log(f"{found.model} version {found.version}{aliases}", "bold")
        for key, value in found.tags.items():
            terminal.log(f"  {key:10} {value}")
        if found.scores:
            rows = [[s.dataset, _figure(s.base_accuracy), _figure(s.accuracy)] for s in found.scores]
            terminal.show(table("Accuracy", ["task or base ability", "base", "this version"], rows))
        if found.damage:
            terminal.log(f"  {found.damage}", "red")
        if found.experts:
            rows = [[name, "retired" if name in found.retired else where] for name, where in found.experts.items()]
            terminal.show(table("Experts", ["expert", "version"], rows))
        for key, value in found.parameters.items():
            terminal.log(f"  {key:32} {value}")
        terminal.log(f"  {'run':32} {found.run_id}")


def diff(before: Version, after: Version, json: Json = False, registry_uri: RegistryUri = None) -> None:
    """Compare two versions of pools: accuracies that differ, experts that came or went, prompts that change hands."""
    with registry(registry_uri) as terminal:
        found = difference(meant(before), meant(after))
        if json:
            print_json(found.to_json())
            return
        terminal.log(f"{found.before} -> {found.after}", "bold")
        changed = [row for row in found.scores if row[1] != row[2]]
        rows = [
            [name, _figure(old), _figure(new), f"{new - old:+.3f}" if old is not None and new is not None else ""]
            for name, old, new in changed
        ]
        if rows:
            terminal.show(table("Accuracies that differ", ["task or base ability", "before", "after", "change"], rows))
        terminal.log(f"{len(found.scores) - len(changed)} of {len(found.scores)} accuracies are equal")
        if found.incomparable:
            terminal.log(f"other evaluation prompts, so not to be compared: {', '.join(found.incomparable)}")
        changes = {
            "added": found.added,
            "removed": found.removed,
            "retired": found.retired,
            "in use again": found.restored,
        }
        for what, names in changes.items():
            if names:
                terminal.log(f"experts {what}: {', '.join(names)}")
        for name, (old, new) in found.replaced.items():
            terminal.log(f"expert {name} replaced: {old} -> {new}")
        if found.moved is None:
            terminal.log("which prompts change hands is not known: one of the two has not noted who answered them")
            return
        rows = [[m.dataset, m.id, m.question, m.before, m.after] for m in found.moved[:MOVED]]
        if rows:
            terminal.show(table("Prompts that change hands", ["of", "id", "question", "before", "after"], rows))
        more = f", {MOVED} of them above; --json has all" if len(found.moved) > MOVED else ""
        terminal.log(f"{len(found.moved)} evaluation prompts change hands{more}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
