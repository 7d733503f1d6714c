"""The canonical row and how users' rows become one.

Canonical: `messages` (role and content, the last one the assistant's answer, `<image>` where an image belongs) and
`images` (encoded bytes or paths), as LLaMA-Factory and ms-swift read them. Accepted beside it: LLaVA's `conversations`
(from/value, `image`) and benchmark rows with a question, an answer or a list of answers, and an image. Text-only rows are
normal.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.config import ColumnsConfig
from pipeline.models.prompts import IMAGE_PLACEHOLDER

_LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant")
_LEADING_IMAGES = re.compile(rf"(\s*{re.escape(IMAGE_PLACEHOLDER)})*")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason that goes into the quarantine file."""


@dataclass(frozen=True)
class Record:
    """One row in canonical form, images decoded."""

    id: str
    messages: list[dict[str, str]]
    images: list[Image.Image]
    answers: list[str]
    """Accepted answers; the first is the one to learn."""

    @property
    def question(self) -> str:
        """Text of the last user message, without image placeholders."""
        text = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        return text.replace(IMAGE_PLACEHOLDER, "").strip()


def to_record(row: Mapping[str, Any], columns: ColumnsConfig, *, name: str, prompt: str, folder: Path) -> Record:
    """Turns a user's row into a record; raises BadRow with the reason where that is impossible.

    `name` is the row's id where the file has none; `prompt` the task's template; relative image paths count from `folder`.
    """
    identity = row.get(columns.id)
    name = name if identity is None else str(identity)
    images = _images(row, columns, folder)
    messages, answers = _messages(row, columns)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise BadRow("the last message must be the assistant's answer, after at least one of the user")
    if not messages[-1]["content"].strip():
        raise BadRow("the answer is empty")
    placeholders = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages)
    if placeholders == 0 and images:
        first = next(i for i, m in enumerate(messages) if m["role"] == "user")
        messages[first]["content"] = IMAGE_PLACEHOLDER * len(images) + messages[first]["content"]
    elif placeholders != len(images):
        raise BadRow(f"{placeholders} {IMAGE_PLACEHOLDER} in the messages, but {len(images)} images")
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    text = messages[first]["content"]
    question = _LEADING_IMAGES.sub("", text, count=1)
    messages[first]["content"] = text.removesuffix(question) + prompt.replace("{question}", question)
    return Record(name, messages, images, answers)


def _messages(row: Mapping[str, Any], columns: ColumnsConfig) -> tuple[list[dict[str, str]], list[str]]:
    """Returns the conversation and the accepted answers."""
    if columns.question is not None and columns.answer is not None:
        question, answer = row.get(columns.question), row.get(columns.answer)
        if question is None or answer is None:
            missing = columns.question if question is None else columns.answer
            raise BadRow(f"column {missing!r} is missing or null")
        answers = [str(a) for a in answer if a is not None] if isinstance(answer, (list, tuple)) else [str(answer)]
        if not answers:
            raise BadRow(f"column {columns.answer!r} holds no answer")
        return [{"role": "user", "content": str(question)}, {"role": "assistant", "content": answers[0]}], answers
    if row.get(columns.messages) is not None:
        said = _turns(row, columns.messages, "role", "content")
    elif row.get("conversations") is not None:
        said = [(_LLAVA_ROLES.get(role, role), text) for role, text in _turns(row, "conversations", "from", "value")]
    else:
        raise BadRow(f"no column {columns.messages!r} (map `columns` in the task if yours is named otherwise)")
    for role, content in said:
        if role not in _ROLES:
            raise BadRow(f"unknown role {role!r}; known: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"the {role}'s content is not text")
    if not any(role == "user" for role, _ in said):
        raise BadRow("no message of the user")
    messages = [{"role": role, "content": content} for role, content in said]
    return messages, [messages[-1]["content"]]


def _turns(row: Mapping[str, Any], column: str, role: str, text: str) -> list[tuple[Any, Any]]:
    """Returns role and text of the messages in `column`, by the keys `role` and `text`."""
    turns = row[column]
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"column {column!r} is not a list of messages")
    return [(turn.get(role), turn.get(text)) for turn in turns]


def _images(row: Mapping[str, Any], columns: ColumnsConfig, folder: Path) -> list[Image.Image]:
    """Decodes the row's images to RGB."""
    found = row.get(columns.images)
    if found is None:
        found = row.get("image")
    if found is None:
        return []
    items = list(found) if isinstance(found, (list, tuple)) else [found]
    return [_image(item, folder) for item in items if item is not None]


def _image(item: Any, folder: Path) -> Image.Image:
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, str):
        path = folder / item
        if not path.is_file():
            raise BadRow(f"image file {item!r} does not exist")
        item = path.read_bytes()
    if not isinstance(item, bytes):
        raise BadRow("an image must be encoded bytes, a path, or a mapping with one of them")
    try:
        return Image.open(io.BytesIO(item)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRow(f"an image cannot be decoded: {error}") from None


def parse_line(line: str) -> dict[str, Any]:
    """Parses one line of a jsonl file; raises BadRow."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow("a line must hold one JSON object")
    return row
