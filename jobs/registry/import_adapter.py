"""Makes somebody's PEFT LoRA an expert of a pool."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from jobs.adding import PoolAddress, Replace, add_to_pool
from jobs.endings import user_errors
from jobs.options import ConfigFile, Overrides, load_as
from jobs.registry.options import Json, RegistryUri, print_json
from pipeline.config import AddConfig
from pipeline.learning.progress import LoggedProgress


def import_adapter(
    adapter: Annotated[Path, typer.Argument(help="PEFT folder: adapter_config.json, adapter_model.safetensors.")],
    task: ConfigFile,
    pool: PoolAddress,
    overrides: Overrides = None,
    replace: Replace = False,
    json: Json = False,
    registry_uri: RegistryUri = None,
) -> None:
    """Make somebody's PEFT LoRA an expert of a pool: its weights stay as they are, only its routing is learned.

    CONFIG is what `pointsman add` reads: its `task` says by which prompts the expert is recognised (a few hundred are enough)
    and how it is evaluated. The folder is checked before anything runs. On a cluster: `pointsman add` with task.adapter.
    """
    with user_errors():
        given = f"task.adapter={json_text.dumps(str(adapter.absolute()))}"
        settings = load_as(task, [*(overrides or []), given], AddConfig)
        progress = LoggedProgress() if json else None
        summary = add_to_pool(settings, pool, registry_uri, replaces=replace, progress=progress)
        if json:
            print_json(summary)
