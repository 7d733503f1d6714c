"""Puts another version of an expert in its place."""

from typing import Annotated

import typer

from jobs.registry.options import Json, Pool, RegistryUri
from jobs.registry.reaching import pool_model, registry
from jobs.terminal import print_json
from pipeline.learning.replacing import replace_expert
from pipeline.registry.browsing import meant
from pipeline.registry.versions import version_at


def replace(
    pool: Pool,
    expert: Annotated[str, typer.Argument(help="Version of an expert, e.g. tiny.expert.clock/1.")],
    force: Annotated[bool, typer.Option("--force", help="Promote it, whatever the gate says.")] = False,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make a version of the pool in use with another version of an expert, e.g. an earlier training of the same task.

    It is measured on the evaluation prompts that the registry keeps, and becomes champion if the gate lets it pass.
    """
    with registry(registry_uri) as terminal:
        before = meant(pool_model(pool))
        done = replace_expert(before, version_at(expert), force=force)
        if json:
            print_json(done.to_json())
            return
        terminal.log(f"{done.model} version {done.version}: version {done.before} with {expert}; {done.verdict}")
        if done.unmeasured:
            terminal.log(f"not measured, since the registry keeps no evaluation prompts: {', '.join(done.unmeasured)}")
        if done.undecided:
            terminal.log(f"not measured, since the router chooses while it answers: {', '.join(done.undecided)}")
        terminal.log(f"pointsman registry diff {done.model}/{done.before} {done.model}/{done.version}")
