"""LoRA folders as stock PEFT and the servers that read its format load them: no field that only this project knows.

Shapes: R rank, D input width, O output width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from pipeline.routing.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, adapter_key, ranks_of
from pipeline.routing.serialization import write_tensors


def peft_config(paths: Sequence[str], *, rank: int, scaling: float, base_name: str | None) -> dict[str, Any]:
    """Returns the `adapter_config.json` of a plain LoRA of one rank and scaling on the Linears at `paths`.

    The Linears are listed by their full paths: a suffix such as `q_proj` also means those of the vision tower, and a
    regular expression is not read by every server.
    """
    alpha = scaling * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(paths),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def write_peft_folder(
    folder: Path, adapters: Mapping[str, Adapter], *, base_name: str | None, rank: int | None = None
) -> None:
    """Writes adapters of one scaling into a new folder; with `rank`, A and B are padded with zeros to that rank.

    Padding changes neither the product B A nor its scaling.
    """
    (scaling,) = {adapter.scaling for adapter in adapters.values()}
    rank = rank or max(ranks_of(adapters).values())
    weights = {}
    for path, adapter in adapters.items():
        whole = padded(adapter, rank)
        weights[adapter_key(path, "A")], weights[adapter_key(path, "B")] = whole.a_RD, whole.b_OR
    folder.mkdir(parents=True)
    write_tensors(folder / ADAPTER_WEIGHTS, weights, metadata={"format": "pt"})
    config = peft_config(list(adapters), rank=rank, scaling=scaling, base_name=base_name)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def padded(adapter: Adapter, rank: int) -> Adapter:
    """Returns an adapter of a higher rank that computes the same update: rows of A and columns of B are filled with zeros."""
    more = rank - len(adapter.a_RD)
    assert more >= 0, "a lower rank would be another update"
    return Adapter(
        pad(adapter.a_RD, (0, 0, 0, more)).contiguous(), pad(adapter.b_OR, (0, more)).contiguous(), adapter.scaling
    )
