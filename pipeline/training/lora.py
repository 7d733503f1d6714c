"""The LoRA of an expert on the base: put on, taken off, written as PEFT does."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from pipeline.config import ExpertConfig
from pipeline.models.bases import Base
from pipeline.routing.adapters import ADAPTER_WEIGHTS
from pipeline.training.zero import gathered


def with_lora(
    base: Base, config: ExpertConfig, *, start: Path | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Returns the PEFT model of the expert stage: a fresh LoRA in `dtype`, or the one in the folder `start`."""
    pattern = base.family.linears if config.target_modules == "auto" else config.target_modules
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=pattern,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base.model, lora)
    if start is not None:
        set_peft_model_state_dict(peft, load_file(start / ADAPTER_WEIGHTS))
    for parameter in peft.parameters():
        if parameter.requires_grad and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return peft


def without_lora(base: Base, peft: Any) -> None:
    """Takes the adapters off the base, which is then as it was."""
    peft.unload()
    vars(base.model).pop("peft_config", None)  # PEFT would take the next LoRA for a second one beside this


def save_lora(peft: Any, folder: Path, *, write: bool) -> None:
    """Writes the adapter as PEFT does; every rank must call it (ZeRO-3 gathers), the one with `write` writes."""
    with gathered([p for p in peft.parameters() if p.requires_grad]):
        if write:
            state = {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(peft).items()}
            peft.save_pretrained(folder, state_dict=state, selected_adapters=["default"])
