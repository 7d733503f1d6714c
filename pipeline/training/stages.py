"""The two stages of a task: what is trained, and the loop that both share.

Expert stage: PEFT LoRA on every language Linear, loss on answer tokens only. Router stage: base and expert frozen, one
routing vector a Linear; in the same pass the features of every prompt are taken down for the prompt router.
"""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config import ExpertConfig
from pipeline.models.bases import Base
from pipeline.models.prompts import IGNORED, to_device
from pipeline.routing.evidence import EvidenceReader
from pipeline.routing.expert import ADAPTER_WEIGHTS, load_adapters
from pipeline.routing.features import project
from pipeline.routing.layer import GatedLinear
from pipeline.routing.routed_model import PromptReader
from pipeline.streams.batch_loader import BatchLoader
from pipeline.training.zero import gathered


class Divergence(ValueError):
    """A loss that is not finite or explodes."""


@dataclass
class StageClock:
    """What a stage has cost so far."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Of every step; `seconds` may hold more than their sum."""


def warm_up_cosine(config: ExpertConfig) -> Callable[[int], float]:
    """Returns the learning-rate factor by step: linear warm-up, then half a cosine down to zero."""
    rising = max(1, round(config.warm_up * config.steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, config.steps - rising)))

    return factor


def run_steps(
    engine: Any,
    loader: BatchLoader,
    steps: range,
    *,
    explosion: float,
    clock: StageClock,
    on_step: Callable[[int, float], None],
    before: Callable[[dict[str, Any]], None] = lambda batch: None,
) -> None:
    """Runs optimizer steps; `on_step(step, loss)` after each, `before(batch)` ahead of each forward pass.

    A step takes the micro-batches that the loader gives for it; its loss is the mean of their means, averaged over workers, so
    that all of them see a divergence at the same step. Raises Divergence when it is not finite, or exceeds `explosion`
    times the first one.
    """
    device = engine.device
    for step in steps:
        started = time.monotonic()
        waited = loader.wait_seconds
        mean = torch.zeros((), device=device)
        micro_batches = next(loader)
        for micro_batch in micro_batches:
            batch = to_device(micro_batch, device)
            before(batch)
            loss = answer_loss(engine, batch)
            engine.backward(loss)
            engine.step()
            mean += loss.detach().float() / len(micro_batches)
        if dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        value = mean.item()
        clock.losses.append(value)
        if not math.isfinite(value):
            raise Divergence(f"the loss is {value} at step {step + 1}; lower the learning rate, or check the data")
        if value > explosion * max(clock.losses[0], 0.1):
            raise Divergence(
                f"the loss rose from {clock.losses[0]:.3g} to {value:.3g} by step {step + 1} (training.explosion is "
                f"{explosion:g}); lower the learning rate"
            )
        clock.step_seconds.append(time.monotonic() - started)
        clock.seconds += clock.step_seconds[-1]
        clock.wait_seconds += loader.wait_seconds - waited
        on_step(step + 1, value)


def answer_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Returns the mean cross-entropy of the answers' tokens, the loss that transformers' models return for `labels`.

    Logits are computed only at the K tokens whose next one is learned. Over all T tokens they would be the largest tensor
    of all: 12 T V bytes with their gradient, 4.5 GB for a row of 4,096 tokens and InternVL-2's vocabulary V.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    next_BT = batch["labels"][:, 1:]
    learned_BT = next_BT != IGNORED
    kept_BT = functional.pad(learned_BT, (0, 1))  # the last token has no next one
    logits_KV = model(**inputs, logits_to_keep=kept_BT, use_cache=False).logits
    total = functional.cross_entropy(logits_KV.float(), next_BT[learned_BT], reduction="sum")
    return total / max(1, len(logits_KV))  # a batch that only keeps others company learns nothing


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


def with_lora(base: Base, config: ExpertConfig, *, start: Path | None = None) -> nn.Module:
    """Returns the PEFT model of the expert stage: a fresh LoRA, or the one in the folder `start`."""
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
    return peft


def save_lora(peft: Any, folder: Path, *, write: bool) -> None:
    """Writes the adapter as PEFT does; every rank must call it (ZeRO-3 gathers), the one with `write` writes."""
    with gathered([p for p in peft.parameters() if p.requires_grad]):
        if write:
            state = {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(peft).items()}
            peft.save_pretrained(folder, state_dict=state, selected_adapters=["default"])


def with_gates(model: nn.Module, adapter: Path) -> dict[str, GatedLinear]:
    """Puts a gated Linear in place of every Linear that the adapter in `adapter` changes; returns them by path."""
    model.requires_grad_(False)
    gates = {}
    for path, lora in load_adapters(adapter)[1].items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        gates[path] = GatedLinear(linear, lora.a_RD, lora.b_OR, lora.scaling)
        model.set_submodule(path, gates[path])
    return gates


class PromptLog:
    """Takes down what routers need to know of all prompts that pass through a model.

    Features at the language model's input, and the pooled inputs of the Linears at `paths`.
    """

    def __init__(self, model: nn.Module, width: int, paths: Sequence[str]) -> None:
        self._width = width
        self._features: list[Tensor] = []
        self._evidence = EvidenceReader(model, paths)
        self._reader = PromptReader(model, self._listen)

    def expect(self, batch: dict[str, Any]) -> None:
        """Says which tokens of the coming batch are prompt: those that carry no label."""
        self._reader.prompt_mask = batch["attention_mask"].bool() & (batch["labels"] == IGNORED)

    def _listen(self, features: Tensor | None, tokens: Tensor | None) -> None:
        self._evidence.tokens_BT = tokens
        if features is not None:
            self._features.append(project(features.detach(), self._width).cpu())

    def collect(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the features (N, F) and the samples of every distinct input of all ranks' rows, alike on every rank."""
        self._reader.remove()
        self._evidence.remove()
        own = torch.cat(self._features), {path: torch.cat(s) for path, s in self._evidence.samples.items()}
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return own
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return torch.cat([features for features, _ in parts]), {
            path: torch.cat([samples[path] for _, samples in parts]) for path in own[1]
        }


def adapted_paths(base: Base, pattern: str) -> list[str]:
    """Returns the paths of the Linears that an expert adapts, by `expert.target_modules`.

    `auto` is the regular expression of the base's family. Raises ValueError if it matches no Linear in full.
    """
    pattern = base.family.linears if pattern == "auto" else pattern
    paths = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]
    if not paths:
        raise ValueError(f"expert.target_modules: {pattern!r} matches no Linear of the base")
    return paths


def heard_paths(base: Base, pattern: str) -> list[str]:
    """Returns the Linears whose inputs are evidence: all of the language model, and those that `pattern` adapts.

    Not only the adapted ones: experts that adapt different Linears are compared at all of them.
    """
    wanted = {*adapted_paths(base, "auto"), *adapted_paths(base, pattern)}
    return [name for name, _ in base.model.named_modules() if name in wanted]
