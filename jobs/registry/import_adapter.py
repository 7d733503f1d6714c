"""Makes somebody's PEFT LoRA an expert of a pool."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from jobs.endings import user_errors
from jobs.options import ConfigFile, Overrides, load_as
from jobs.registry.options import AddTo, Json, RegistryUri, Replace
from pipeline.config import AddConfig


def import_adapter(
    adapter: Annotated[Path, typer.Argument(help="PEFT folder: adapter_config.json, adapter_model.safetensors.")],
    task: ConfigFile,
    pool: AddTo,
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
        from jobs.adding import add_to_pool

        add_to_pool(settings, pool, registry_uri, replaces=replace, as_json=json)
