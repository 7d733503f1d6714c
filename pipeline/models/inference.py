"""Inference with a frozen base: loading it and making batches of prompts, for all purposes but training.

- Each worker loads the base once, on the CPU, on a GPU, or with its layers spread over several GPUs.
- A batch is bounded by its tokens, padding included, so memory does not depend on the length of prompts. Prompts of similar
  length share a batch; results come in the order of the prompts.
- Logits are computed at the last token only: over all tokens they would be the largest tensor of all.

`evaluation`, `data.encoded`, `training.null_expert` build their actors on it. Shapes: B rows, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import BaseModelConfig, InferenceConfig, TrainingConfig
from pipeline.models.bases import load_base
from pipeline.models.encoding import Encoded, collate_for, to_device
from pipeline.models.generation import generate_answers
from pipeline.models.placement import CPU


@dataclass(frozen=True)
class InferenceWorkers:
    """Number of inference workers, their resources and batch limits."""

    count: int = 1
    cpus_per_worker: int = 2
    """CPUs per worker."""
    gpus: int = 0
    """GPUs per worker; 0: it computes on the CPU, whatever the machine has."""
    batch_size: int = 64
    """Most rows in a batch."""
    tokens_per_batch: int = 16384
    """Most tokens in a batch, padding included."""
    expert_memory: int | None = None
    """Most bytes of experts' weights on a worker's devices together; None: all experts stay there."""

    @classmethod
    def of(cls, training: TrainingConfig, evaluation: InferenceConfig) -> "InferenceWorkers":
        """Returns the workers of a configuration."""
        return cls(
            count=evaluation.workers,
            cpus_per_worker=training.cpus_per_worker,
            gpus=evaluation.gpus_per_worker if training.gpu else 0,
            batch_size=evaluation.batch_size,
            tokens_per_batch=evaluation.tokens_per_batch,
            expert_memory=evaluation.expert_memory,
        )

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of one worker, by its own numbering."""
        return tuple(f"cuda:{i}" for i in range(self.gpus)) or (CPU,)


FILLED = 0.7
"""Share of a GPU that a base's weights may take where a pool is served; the rest is for the KV cache and activations."""


def gpus_to_serve(folder: Path) -> int:
    """Returns the number of this machine's GPUs needed to serve the base in `folder`; 0 without GPUs."""
    if not torch.cuda.is_available():
        return 0
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return min(torch.cuda.device_count(), max(1, math.ceil(size / (FILLED * memory))))


def batches(lengths: Sequence[int], *, rows: int, tokens: int) -> list[list[int]]:
    """Groups prompts by length: indices, longest first, at most `rows` per group and `tokens` with padding.

    A prompt longer than `tokens` is a group of its own.
    """
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not room:
            groups.append([])
            room = max(1, min(rows, tokens // max(1, lengths[i])))  # the first of a group is its longest
        groups[-1].append(i)
        room -= 1
    return groups


class FrozenBase:
    """A worker's frozen base; subclasses add what they compute."""

    def __init__(self, config: BaseModelConfig, workers: InferenceWorkers, *, vision: bool = True) -> None:
        torch.set_num_threads(workers.cpus_per_worker)
        self.workers = workers
        self.base = load_base(config, vision=vision, devices=workers.devices)

    @property
    def device(self) -> str:
        """Device of the inputs."""
        return self.workers.devices[0]

    def batches(self, rows: Sequence[Encoded], size: int | None = None) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Yields indices and rows of one batch after the other, at most `size` (default: the workers') rows each."""
        lengths = [len(row.input_ids) for row in rows]
        for group in batches(lengths, rows=size or self.workers.batch_size, tokens=self.workers.tokens_per_batch):
            yield group, [rows[i] for i in group]

    @torch.inference_mode()
    def read(self, rows: Sequence[Encoded]) -> None:
        """Runs the base over prompts (one batch) for its hooks; logits at each row's last token only."""
        inputs = to_device(collate_for(self.base.processor, rows, "left"), self.device)
        del inputs["labels"]
        self.base.model(**inputs, use_cache=False, logits_to_keep=1)

    def answer(self, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """Answers prompts (one batch) greedily."""
        return generate_answers(
            self.base.model, self.base.processor, rows, max_new_tokens=max_new_tokens, device=self.device
        )

    @torch.inference_mode()
    def image_embeds(self, row: Encoded) -> torch.Tensor:
        """Returns the embeddings of a row's images (image tokens, D)."""
        batch = collate_for(self.base.processor, [row])
        arrays: dict[str, Any] = {name: to_device(batch[name], self.device) for name in row.images}
        embeds = self.base.model.base_model.get_image_features(**arrays, return_dict=True).pooler_output
        return torch.cat([part.flatten(0, -2) for part in embeds])
