"""Exports pools and experts for others."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from jobs.registry.options import Json, RegistryUri, Version
from jobs.registry.reaching import registry
from jobs.terminal import print_json
from pipeline.registry.browsing import meant
from pipeline.registry.exports import ExportFormat, model_id, prepare_export

LINES = 20
"""Most experts of which each is reported when it is written; of more, every tenth part."""


def export(
    version: Version,
    format: Annotated[
        ExportFormat, typer.Option(help="For stock PEFT, for vLLM, or a pool for this project elsewhere.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; empty, or not there yet.")],
    expert: Annotated[list[str] | None, typer.Option(help="Only this expert of a pool; can be repeated.")] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            help="What adapters call their base, such as the name that vLLM serves it by; default: its hub id or name."
        ),
    ] = None,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Write a pool, or an expert, to a folder that others can load: stock PEFT folders, adapters for vLLM, or the pool itself.

    The folder's README.md says how. It appears whole or not at all; the same export again finds it complete.
    """
    with registry(registry_uri) as terminal, tempfile.TemporaryDirectory() as scratch:
        prepared = prepare_export(meant(version), format, Path(scratch), experts=expert or (), base_name=base_name)
        total, done = len(prepared.experts), 0

        def tell(name: str) -> None:
            nonlocal done
            done += 1
            if not json and (total <= LINES or done % max(1, total // 10) == 0):
                terminal.log(f"  {name} ({done}/{total})")

        there = prepared.write(out, tell)
        record = prepared.record
        if json:
            experts = {name: model_id(entry.reference) for name, entry in prepared.experts.items()}
            print_json(
                {
                    "folder": str(out.absolute()),
                    "format": record.format,
                    "source": record.source,
                    "base_name": record.base_name,
                    "experts": experts,
                    "already_complete": there,
                }
            )
            return
        terminal.log(
            f"{out} {'is complete already' if there else 'is written'}: {record.source}, {total} expert{'s' * (total != 1)}, "
            f"base {record.base_name}; see its README.md"
        )
