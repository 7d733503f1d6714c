"""From a conversation to tensors: prompts, labels, padding, batches.

Used for training and generation alike. Shapes: B rows, T tokens
(padded), D the language model's width; image arrays begin with an axis of tiles, patches or images, as the family has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.errors import UserError
from pipeline.models.processors import BatchLayout

IGNORED = -100
"""Label of a token that the loss leaves out."""

IMAGE_PLACEHOLDER = "<image>"
"""Placeholder of an image inside a message's text."""

IMAGE_EMBEDS = "image_features"
"""Name of a row's array of image embeddings (tokens, D), which replaces its pixels."""

_PIXELS_BY_ROW = ("pixel_values", "pixel_attention_mask")
"""Arrays with an axis of rows before that of images, in families that have one."""


class PromptError(UserError):
    """A conversation that this base cannot read; the message is the reason."""


@dataclass(frozen=True)
class Encoded:
    """One row as model inputs, without padding."""

    input_ids: np.ndarray
    """(T,) int64."""
    labels: np.ndarray
    """(T,) int64; `IGNORED` on the prompt."""
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Arrays of this row's images by name (`pixel_values`, ...); none for a text-only row."""
    token_fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further arrays with one value per token (T,), such as Qwen's `mm_token_type_ids`."""
    image_id: int | None = None
    """Hash of the pixels where `images` holds embeddings; None: `image_hash` computes it from `images`."""


def chat(messages: Sequence[Mapping[str, str]], *, spaces: bool = True) -> list[dict[str, Any]]:
    """Turns `<image>` placeholders inside message texts into the content parts that chat templates expect.

    White space at both ends of a message is dropped. White space beside an image is kept with `spaces`; without, it is
    dropped too, for templates that separate images from text themselves.
    """
    conversation = []
    for message in messages:
        pieces = message["content"].strip().split(IMAGE_PLACEHOLDER)
        parts: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            if i:
                parts.append({"type": "image"})
            if text := piece if spaces else piece.strip():
                parts.append({"type": "text", "text": text})
        conversation.append({"role": message["role"], "content": parts})
    return conversation


@lru_cache(maxsize=8)
def _leaves_space(processor: Any, template: str) -> bool:
    """Whether a base's chat template adds no white space between an image and text beside it."""
    before, after = "\u2062 ", " \u2063"  # characters that no template holds
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except (ValueError, TemplateError):
        return False
    image = text.partition(before)[2].partition(after)[0]
    return bool(image) and image == image.strip()


def encode(
    processor: Any, messages: Sequence[Mapping[str, str]], images: Sequence[Image.Image], *, answer: bool = True
) -> Encoded:
    """Encodes a conversation whose last message is the assistant's answer.

    Prompt and answer are tokenized apart, so that a training row starts with exactly the tokens that generation starts
    with. With `answer=False` only the prompt is encoded. Raises PromptError for what this base cannot read: images
    where it sees none or whose shape its processor refuses, roles that its chat template does not know.
    """
    if images and processor.image_processor is None:
        raise PromptError(f"{len(images)} images, but the base reads text only")
    conversation = chat(messages, spaces=bool(images) and _leaves_space(processor, str(processor.chat_template)))
    for part in (part for message in conversation for part in message["content"] if part["type"] == "text"):
        if processor.image_token and processor.image_token in part["text"]:
            raise PromptError(
                f"the text holds {processor.image_token}, which stands for an image in this base's prompts"
            )
    try:
        prompt = processor.apply_chat_template(conversation[:-1], add_generation_prompt=True, tokenize=False)
        full_text = processor.apply_chat_template(conversation, tokenize=False) if answer else ""
        inputs = dict(processor(images=list(images) or None, text=[prompt], return_tensors="np"))
    except (ValueError, TemplateError) as error:
        raise PromptError(f"the base's processor refuses it: {error}") from None
    ids = np.asarray(inputs.pop("input_ids")[0], dtype=np.int64)
    for unused in ("attention_mask", "token_type_ids"):
        inputs.pop(unused, None)
    token_fields = {name: np.asarray(a[0]) for name, a in inputs.items() if np.shape(a) == (1, len(ids))}
    arrays = {name: np.asarray(a) for name, a in inputs.items() if name not in token_fields}
    if processor.layout.row_axis:
        arrays |= {name: arrays[name][0] for name in _PIXELS_BY_ROW if name in arrays}
    if "pixel_values" in arrays:
        arrays["pixel_values"] = arrays["pixel_values"].astype(np.float32, copy=False)
    if not answer:
        return Encoded(ids, np.full_like(ids, IGNORED), arrays, token_fields)
    if not full_text.startswith(prompt):
        raise ValueError(
            "the chat template does not put the generation prompt before the answer; cannot mask the prompt"
        )
    answer_ids = processor.tokenizer(full_text[len(prompt) :], add_special_tokens=False)["input_ids"]
    answer_ids = np.asarray(answer_ids, dtype=np.int64)
    zeros = np.zeros(len(answer_ids), dtype=np.int64)
    return Encoded(
        input_ids=np.concatenate([ids, answer_ids]),
        labels=np.concatenate([np.full_like(ids, IGNORED), answer_ids]),
        images=arrays,
        token_fields={name: np.concatenate([values, zeros]) for name, values in token_fields.items()},
    )


def without_answer(row: Encoded) -> Encoded:
    """Returns the prompt of a training row, as for generation."""
    length = int(np.flatnonzero(row.labels != IGNORED)[0]) if (row.labels != IGNORED).any() else len(row.labels)
    token_fields = {name: values[:length] for name, values in row.token_fields.items()}
    return replace(row, input_ids=row.input_ids[:length], labels=row.labels[:length], token_fields=token_fields)


def image_hash(row: Encoded) -> int:
    """Returns a hash (64 bits) of a row's images; 0 without images."""
    if row.image_id is not None or not row.images:
        return row.image_id or 0
    return _hash(*(part for name in sorted(row.images) for part in (name.encode(), row.images[name].tobytes())))


def ids(rows: Sequence[Encoded]) -> torch.Tensor:
    """Returns ids (B, 2), int64, of each row's images and of its prompt; without images both are the prompt's."""
    pairs = []
    for row in rows:
        image_id = image_hash(row)
        prompt = _hash(image_id.to_bytes(8, "little", signed=True), row.input_ids[row.labels == IGNORED].tobytes())
        pairs.append((image_id or prompt, prompt))
    return torch.tensor(pairs, dtype=torch.int64)


def _hash(*parts: bytes) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def collate(
    rows: Sequence[Encoded], *, pad_token_id: int, side: str = "right", layout: BatchLayout | None = None
) -> dict[str, Any]:
    """Pads rows to one length (`side` "right" to train, "left" to generate) and joins all their images.

    Returns `input_ids`, `attention_mask`, `labels` and token fields (B, T), and the rows' image arrays, joined along their
    first axis; cached embeddings go under `mm_encoder_outputs`, which transformers' models read instead of pixels.
    """
    layout = layout or BatchLayout()
    length = max(len(row.input_ids) for row in rows)
    pads = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
    pads |= {name: 0 for row in rows for name in row.token_fields}
    padded = {name: np.full((len(rows), length), pad, dtype=np.int64) for name, pad in pads.items()}
    for i, row in enumerate(rows):
        span = slice(0, len(row.input_ids)) if side == "right" else slice(length - len(row.input_ids), length)
        values: dict[str, Any] = {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "attention_mask": 1,
            **row.token_fields,
        }
        for name, value in values.items():
            padded[name][i, span] = value
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in padded.items()}
    for name in dict.fromkeys(name for row in rows for name in row.images):
        joined = torch.from_numpy(np.concatenate([row.images[name] for row in rows if name in row.images]))
        if name == IMAGE_EMBEDS:
            batch["mm_encoder_outputs"] = {"image": _encoder_output(joined, layout)}
        else:
            batch[name] = joined[None] if layout.row_axis and name in _PIXELS_BY_ROW else joined
    return batch


def collate_for(processor: Any, rows: Sequence[Encoded], side: str = "right") -> dict[str, Any]:
    """Makes a batch in the processor's layout; see `collate`."""
    return collate(rows, pad_token_id=processor.tokenizer.pad_token_id, side=side, layout=processor.layout)


def _encoder_output(embeds_ND: torch.Tensor, layout: BatchLayout) -> BaseModelOutputWithPooling:
    if embeds_ND.dtype == torch.uint16:  # numpy has no bfloat16; its bits travel as integers
        embeds_ND = embeds_ND.view(torch.bfloat16)
    return BaseModelOutputWithPooling(pooler_output=[embeds_ND] if layout.image_embeds == "list" else embeds_ND)


def to_device(value: Any, device: str | torch.device) -> Any:
    """Moves all tensors of a batch, wherever they are nested in it."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device) for key, item in value.items()}
        return type(value)(**moved) if isinstance(value, BaseModelOutputWithPooling) else moved
    return [to_device(item, device) for item in value] if isinstance(value, list) else value
