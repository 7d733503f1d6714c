"""From a conversation to tensors and back: prompts, labels, padding, answers.

The one place that knows how a row becomes model inputs, for training and for generation alike. Shapes: B rows, T tokens
(padded), N image tiles over all rows of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

IGNORED = -100
"""Label of a token that the loss leaves out."""

IMAGE_PLACEHOLDER = "<image>"
"""What stands for an image inside a message's text."""


@dataclass(frozen=True)
class Encoded:
    """One row as model inputs, without padding."""

    input_ids: np.ndarray
    """(T,) int64."""
    labels: np.ndarray
    """(T,) int64; `IGNORED` on the prompt."""
    pixel_values: np.ndarray
    """(N, 3, H, W) float32, the tiles of this row; N is 0 for a text-only row."""


def chat(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Turns `<image>` placeholders inside message texts into the content parts that chat templates expect."""
    conversation = []
    for message in messages:
        pieces = message["content"].split(IMAGE_PLACEHOLDER)
        parts: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "image"})
            if piece.strip():
                parts.append({"type": "text", "text": piece.strip()})
        conversation.append({"role": message["role"], "content": parts})
    return conversation


def encode(
    processor: Any, messages: Sequence[Mapping[str, str]], images: Sequence[Image.Image], *, answer: bool = True
) -> Encoded:
    """Encodes a conversation whose last message is the assistant's answer.

    Prompt and answer are tokenized apart, so that a training row starts with exactly the tokens that generation will
    start with. With `answer=False` only the prompt is encoded.
    """
    conversation = chat(messages)
    prompt = processor.apply_chat_template(conversation[:-1], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=list(images) or None, text=[prompt], return_tensors="np")
    prompt_ids = np.asarray(inputs["input_ids"][0], dtype=np.int64)
    if images:
        pixels = np.asarray(inputs["pixel_values"], dtype=np.float32)
    else:
        size = processor.image_processor.size
        pixels = np.zeros((0, 3, size["height"], size["width"]), dtype=np.float32)
    if not answer:
        return Encoded(prompt_ids, np.full_like(prompt_ids, IGNORED), pixels)
    whole = processor.apply_chat_template(conversation, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template does not put the generation prompt before the answer; cannot mask the prompt"
        )
    answer_ids = processor.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    answer_ids = np.asarray(answer_ids, dtype=np.int64)
    return Encoded(
        input_ids=np.concatenate([prompt_ids, answer_ids]),
        labels=np.concatenate([np.full_like(prompt_ids, IGNORED), answer_ids]),
        pixel_values=pixels,
    )


def collate(rows: Sequence[Encoded], *, pad_token_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pads rows to one length (`side` "right" to train, "left" to generate) and stacks all their tiles.

    Returns `input_ids`, `attention_mask`, `labels` (B, T) and, where any row has an image, `pixel_values` (N, 3, H, W).
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row.input_ids)) if side == "right" else slice(length - len(row.input_ids), length)
        input_ids[i, place], attention_mask[i, place], labels[i, place] = row.input_ids, 1, row.labels
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(labels),
    }
    tiles = [row.pixel_values for row in rows if len(row.pixel_values)]
    if tiles:
        batch["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
    return batch


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, rows: Sequence[Encoded], *, max_new_tokens: int, device: str | torch.device = "cpu"
) -> list[str]:
    """Answers encoded prompts greedily, as one batch; returns the decoded texts without special tokens."""
    batch = collate(rows, pad_token_id=processor.tokenizer.pad_token_id, side="left")
    batch.pop("labels")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
