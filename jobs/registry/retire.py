"""Retires experts."""

from typing import Annotated

import typer

from jobs.registry.options import Json, Pool, RegistryUri
from jobs.registry.reaching import pool_model, registry
from jobs.terminal import print_json
from pipeline.registry import promotion
from pipeline.registry.browsing import meant
from pipeline.registry.successors import check_retires, retire_expert
from pipeline.registry.tracking import run_beside


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
        name = pool_model(pool)
        with promotion.deciding(name):
            in_use = promotion.champion(name)
            while True:
                before = in_use or meant(name)
                check_retires(before, expert)  # before there is a run of it
                with run_beside(before, f"retire {expert}"):
                    now = retire_expert(before, expert)
                in_use = promotion.champion(name)
                if in_use is None or int(in_use.version) in (int(before.version), int(now.version)):
                    break
                if not json:
                    terminal.log(f"version {in_use.version} has become champion meanwhile: once more, from that")
            if in_use is not None:
                promotion.promote(name, str(now.version))
        if json:
            print_json(
                {"model": name, "version": int(now.version), "before": int(before.version), "champion": bool(in_use)}
            )
            return
        place = "is champion now" if in_use is not None else "is the newest; there is no champion"
        terminal.log(f"{name} version {now.version}, version {before.version} without {expert}, {place}")
