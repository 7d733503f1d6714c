"""Greedy generation of answers to a batch of encoded prompts."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.models.encoding import Encoded, collate_for, to_device


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, rows: Sequence[Encoded], *, max_new_tokens: int, device: str | torch.device = "cpu"
) -> list[str]:
    """Answers encoded prompts greedily, as one batch; returns the decoded texts without special tokens."""
    batch = to_device(collate_for(processor, rows, "left"), device)
    batch.pop("labels")
    output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
