"""The two stages of a task: what is trained.

Expert stage: PEFT LoRA on every language Linear, loss on answer tokens only. Router stage: base and expert frozen, one
routing vector a Linear.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config import ExpertConfig
from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED
from pipeline.routing.adapters import ADAPTER_WEIGHTS, Adapter
from pipeline.routing.routed_linear import GatedLinear
from pipeline.training.zero import gathered


def warm_up_cosine(config: ExpertConfig) -> Callable[[int], float]:
    """Returns the learning-rate factor by step: linear warm-up, then half a cosine down to zero."""
    rising = max(1, round(config.warmup_ratio * config.steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, config.steps - rising)))

    return factor


def answer_loss(model: Any, batch: dict[str, Any], *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Returns the cross-entropy of the answers' tokens: the mean, which transformers' models return for `labels`, or the sum.

    Logits are computed only at the K tokens whose next one is learned. Over all T tokens they would be the largest tensor
    of all: 12 T V bytes with their gradient, 4.5 GB for a row of 4,096 tokens and InternVL-2's vocabulary V.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    next_BT = batch["labels"][:, 1:]
    learned_BT = next_BT != IGNORED
    kept_BT = functional.pad(learned_BT, (0, 1))  # the last token has no next one
    logits_KV = model(**inputs, logits_to_keep=kept_BT, use_cache=False).logits
    return functional.cross_entropy(logits_KV.float(), next_BT[learned_BT], reduction=reduction)


def checkpoint_activations(base: Base) -> None:
    """Makes the language model compute activations again for the backward pass instead of keeping them.

    To be called when adapters are in place: PEFT, when it finds checkpointing on, makes all embeddings require gradients,
    those of image patches among them, and the vision tower would run backward. Only the re-entrant form needs that.
    """
    language = base.model.get_submodule(base.family.language)
    language.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    language.disable_input_require_grads()


def without_dropout(model: nn.Module) -> None:
    """Puts a model into evaluation mode, in which layers that are checkpointed go on being so.

    Transformers' layers look at their own `training` before they compute anything twice; what is inside them does not.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


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


def with_gates(
    model: nn.Module, adapters: Mapping[str, Adapter], *, dtype: torch.dtype | None = None
) -> dict[str, GatedLinear]:
    """Puts a gated Linear in place of every Linear that one of `adapters` changes; returns them by path.

    Their routing vectors are in `dtype`; default: the base's.
    """
    model.requires_grad_(False)
    gates = {}
    for path, lora in adapters.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        gates[path] = GatedLinear(linear, lora.a_RD, lora.b_OR, lora.scaling, dtype=dtype)
        model.set_submodule(path, gates[path])
    return gates


def without_gates(model: nn.Module, gates: Mapping[str, GatedLinear]) -> None:
    """Puts the Linears back that `with_gates` replaced."""
    for path, gate in gates.items():
        model.set_submodule(path, gate.base)


def adapted_paths(base: Base, pattern: str) -> list[str]:
    """Returns the paths of the Linears that an expert adapts, by `expert.target_modules`.

    `auto` is the regular expression of the base's family. Raises ValueError if it matches no Linear in full.
    """
    pattern = base.family.linears if pattern == "auto" else pattern
    paths = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]
    if not paths:
        raise ValueError(f"expert.target_modules: {pattern!r} matches no Linear of the base")
    return paths


def observed_paths(base: Base, pattern: str) -> list[str]:
    """Returns the Linears whose inputs are evidence: all of the language model, and those that `pattern` adapts.

    Not only the adapted ones: experts that adapt different Linears are compared at all of them.
    """
    wanted = {*adapted_paths(base, "auto"), *adapted_paths(base, pattern)}
    return [name for name, _ in base.model.named_modules() if name in wanted]
