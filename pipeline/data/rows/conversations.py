"""Conversations of rows: messages of any common form become role and text, with `<image>` where an image belongs.

- Forms: role/content (LLaMA-Factory, ms-swift, OpenAI), from/value (LLaVA, ShareGPT), as lists or as JSON strings; contents
  as text or as lists of parts; columns of question and answer.
- What a chat template or a tokenizer would fail on later is a bad row here.
- Images are located, not decoded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ColumnsConfig
from pipeline.data.errors import BadRow, printable
from pipeline.data.rows.json_stream import parse
from pipeline.models.encoding import IMAGE_PLACEHOLDER

LONGEST_TEXT = 1_000_000
"""Characters of the longest text that is tokenized; tokenizing 10 MB takes minutes."""

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages in order (an optional system message, then user and assistant in turn, the assistant last)."""

    messages: list[dict[str, str]]
    answers: tuple[str, ...]
    """Accepted answers; the first is the last message."""
    inline: dict[int, Any] = field(default_factory=dict)
    """Images that came inside the messages, by the number of their placeholder."""


UNANSWERED = ("",)
"""Answers of a row that is only to be answered."""


def conversation_of(row: Mapping[str, Any], columns: ColumnsConfig, *, answered: bool = True) -> Conversation:
    """Returns the conversation of a row; raises BadRow with the reason where it cannot be used.

    `answered=False`: rows need no answer, and one that is there is left out.
    """
    if columns.answer is not None or (not answered and columns.question is not None):
        answers = _answers(row, columns.answer) if answered and columns.answer is not None else UNANSWERED
        question = "" if columns.question is None else _question(row, columns.question)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]
        return Conversation(messages, answers)
    column = columns.messages if row.get(columns.messages) is not None else "conversations"
    if row.get(column) is None:
        what = f"column {columns.messages!r} is missing or null"
        raise BadRow(f"{what} (if your columns are named otherwise, set `columns` or a `preset`)")
    inline: dict[int, Any] = {}
    messages = _messages(row[column], column, inline)
    if not answered:
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        _check_order([*messages, {"role": "assistant", "content": "-"}])
        asked = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
        images = {number: image for number, image in inline.items() if number < asked}
        return Conversation([*messages, {"role": "assistant", "content": ""}], UNANSWERED, images)
    _check_order(messages)
    return Conversation(messages, (messages[-1]["content"],), inline)


def _messages(turns: Any, column: str, inline: dict[int, Any]) -> list[dict[str, str]]:
    if isinstance(turns, str):
        try:
            turns = parse(turns)
        except ValueError:
            turns = None
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"column {column!r} is not a list of messages")
    messages = []
    placeholders = 0
    for turn in turns:
        speaker = turn.get("role") if turn.get("role") is not None else turn.get("from")
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadRow(f"unknown role {printable(repr(speaker), 40)}; known: {', '.join(_ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        text, images = _parts(content, role)
        inline |= {placeholders + index: image for index, image in images.items()}
        placeholders += text.count(IMAGE_PLACEHOLDER)
        if text.strip() or role != "system":  # many exporters write an empty system message
            messages.append({"role": role, "content": checked(text, f"the {role}'s content")})
    return messages


def _parts(content: Any, role: str) -> tuple[str, dict[int, Any]]:
    """Returns a content as text, and its inline images by the number of their placeholder in it."""
    if isinstance(content, str):
        return content, {}
    if not isinstance(content, (list, tuple)):
        raise BadRow(f"the {role}'s content is not text")
    text = ""
    images: dict[int, Any] = {}
    for part in content:
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif part_type in ("image", "image_url"):
            image = next((part[key] for key in ("image", "image_url", "url", "path", "bytes") if part.get(key)), None)
            image = image.get("url") if isinstance(image, Mapping) and "url" in image else image
            if image is not None:
                images[text.count(IMAGE_PLACEHOLDER)] = image
            text += IMAGE_PLACEHOLDER
        else:
            raise BadRow(
                f"a part of the {role}'s content is neither text nor image, but {printable(repr(part_type), 40)}"
            )
    return text, images


def _check_order(messages: list[dict[str, str]]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "user" not in turns:
        raise BadRow("no message of the user")
    if len(turns) < 2 or turns[-1] != "assistant":
        raise BadRow("the last message must be the assistant's answer, after at least one of the user")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow(f"user and assistant must take turns, the user first; found: {', '.join(roles[:8])}")
    for number, message in enumerate(messages):
        if message["content"].replace(IMAGE_PLACEHOLDER, "").strip():
            continue
        what = "question" if message["role"] == "user" else "answer"
        where = "" if number >= len(messages) - 2 else f" (message {number + 1} of {len(messages)})"
        raise BadRow(f"the {what} is empty{where}")


def _question(row: Mapping[str, Any], column: str) -> str:
    text = text_of(row.get(column), f"column {column!r}")
    if text is None:
        raise BadRow(f"column {column!r} is missing or null")
    if not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise BadRow("the question is empty")
    return checked(text, "the question")


def _answers(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Returns the accepted answers: one, a list, or VQA's list of {answer, ...}; missing ones in a list are left out."""
    value = row.get(column)
    if value is None or _not_a_number(value):
        raise BadRow(f"column {column!r} is missing or null (a test split, whose answers are not public?)")
    several = isinstance(value, (list, tuple))
    items = [item.get("answer") if isinstance(item, Mapping) else item for item in (value if several else [value])]
    texts = [checked(text, "an answer") for item in items if (text := text_of(item, f"column {column!r}")) is not None]
    answers = tuple(text for text in texts if text.strip())
    if answers:
        return answers
    raise BadRow(f"column {column!r} holds no answer" if not texts else "the answer is empty")


def text_of(value: Any, what: str) -> str | None:
    """Returns a value as text, None for a missing one (null, NaN); raises BadRow where it is more than one value."""
    if value is None or _not_a_number(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (list, tuple, set, Mapping)):
        raise BadRow(f"{what} holds {type(value).__name__} where text belongs")
    if isinstance(value, float) and value.is_integer():  # tables turn numbers into floats where one of them is missing
        return str(int(value))
    return str(value)


def _not_a_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def checked(text: str, what: str) -> str:
    """Returns `text` if a tokenizer can take it; raises BadRow."""
    if len(text) > LONGEST_TEXT:
        raise BadRow(f"{what} has {len(text):,} characters, {LONGEST_TEXT:,} are read at most")
    if "\x00" in text:
        raise BadRow(f"{what} holds NUL characters (is the file UTF-16?)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escaped = "\udc80" <= text[error.start] <= "\udcff"
        raise BadRow(f"{what} is not valid UTF-8" if escaped else f"{what} holds half a surrogate pair") from None
    return text
