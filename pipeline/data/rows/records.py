"""The canonical row, and the conversion of users' rows to it.

Canonical: `messages` (role and content, the last one the assistant's answer, `<image>` where an image belongs) and
`images` (encoded bytes or paths), as LLaMA-Factory and ms-swift read them. Accepted beside it: LLaVA's `conversations`
(from/value, `image`), messages made of parts, and benchmark rows with a question, an answer or a list of answers, and an
image. Text-only rows are normal. In a conversation of several turns the last answer is trained on, the others are context.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from PIL import Image
from pydantic import Field

from pipeline.config import ColumnsConfig, Config
from pipeline.data.errors import BadRow as BadRow
from pipeline.data.errors import printable
from pipeline.data.rows.conversations import Conversation, checked, conversation_of, text_of
from pipeline.data.rows.images import MAX_PIXELS, Folder, load_image
from pipeline.data.rows.json_stream import parse
from pipeline.models.encoding import IMAGE_PLACEHOLDER

_LEADING_IMAGES = re.compile(rf"(\s*{re.escape(IMAGE_PLACEHOLDER)})*")
_LONGEST_ID = 200


class Reference(Config):
    """Reference of an answer."""

    answers: tuple[str, ...] = Field(min_length=1)
    """Accepted answers; the first is the training target."""
    choices: dict[str, str] = {}
    """Options of a multiple-choice question, text by letter."""
    group: str = ""
    """Rows of one group count as one question, right only if all are (MMBench's circular evaluation); empty: alone."""


@dataclass(frozen=True)
class Record:
    """One row in canonical form, images decoded."""

    id: str
    messages: list[dict[str, str]]
    images: list[Image.Image]
    reference: Reference

    @property
    def question(self) -> str:
        """Text of the last user message, without image placeholders."""
        text = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        return text.replace(IMAGE_PLACEHOLDER, "").strip()


def to_record(
    row: Mapping[str, Any],
    columns: ColumnsConfig,
    *,
    name: str,
    prompt: str,
    folder: Folder,
    max_pixels: int = MAX_PIXELS,
    answered: bool = True,
) -> Record:
    """Turns a user's row into a record; raises BadRow with the reason where that is impossible.

    `name` is the row's id where the file has none; `prompt` the task's template; image paths are read from `folder`; images
    of more than `max_pixels` are refused undecoded. Without `answered` it needs no answer. The row itself is left as it is.
    """
    conversation = conversation_of(row, columns, answered=answered)
    items = _items(row, columns, conversation)
    messages = _with_template(conversation.messages, prompt)
    reference = Reference(answers=conversation.answers, choices=_choices(row, columns), group=_group(row, columns))
    images = [load_image(item, folder, max_pixels=max_pixels) for item in items]
    return Record(identity(row, columns) or name, messages, images, reference)


def identity(row: Mapping[str, Any], columns: ColumnsConfig) -> str:
    """Returns a row's id as text that can be shown; empty where it has none."""
    value = row.get(columns.id)
    missing = value is None or value != value  # NaN
    return "" if missing else printable(str(value), _LONGEST_ID).replace("\x00", "")


def _items(row: Mapping[str, Any], columns: ColumnsConfig, conversation: Conversation) -> list[Any]:
    """Returns the row's images in the order of their placeholders; writes placeholders where there are none."""
    value = row.get(columns.images)
    if value is None or value != value:
        value = row.get("image")
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    items = [item for item in items if not (item is None or item == "" or item != item)]
    placeholders = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in conversation.messages)
    if placeholders == 0 and items:
        first = next(m for m in conversation.messages if m["role"] == "user")
        first["content"] = IMAGE_PLACEHOLDER * len(items) + first["content"]
        return items
    if placeholders != len(items) + len(conversation.inline):
        raise BadRow(
            f"{placeholders} {IMAGE_PLACEHOLDER} in the messages, but {len(items) + len(conversation.inline)} images"
        )
    rest = iter(items)
    return [conversation.inline[index] if index in conversation.inline else next(rest) for index in range(placeholders)]


def _with_template(messages: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    """Puts the task's template around the first question, after the images that lead it."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    text = messages[first]["content"]
    question = _LEADING_IMAGES.sub("", text, count=1)
    text = text.removesuffix(question) + prompt.replace("{question}", question)
    if not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise BadRow("there is no question: name `columns.question`, or ask one in the task's prompt")
    return [*messages[:first], messages[first] | {"content": text}, *messages[first + 1 :]]


def _choices(row: Mapping[str, Any], columns: ColumnsConfig) -> dict[str, str]:
    """Returns the options by their letters; a list's options are A, B, C, ..."""
    options = row.get(columns.choices) if columns.choices is not None else None
    if isinstance(options, str):
        try:
            options = parse(options)
        except ValueError:
            raise BadRow(f"column {columns.choices!r} is neither a mapping nor a list of options") from None
    if options is None or options != options:
        return {}
    if isinstance(options, (list, tuple)):
        options = dict(zip(ascii_uppercase, options, strict=False))
    if not isinstance(options, Mapping):
        raise BadRow(f"column {columns.choices!r} is neither a mapping nor a list of options")
    what = f"column {columns.choices!r}"
    texts = {str(letter): text_of(text, what) for letter, text in options.items()}
    return {letter: checked(text, "an option") for letter, text in texts.items() if text is not None}


def _group(row: Mapping[str, Any], columns: ColumnsConfig) -> str:
    if columns.group is None:
        return ""
    return checked(text_of(row.get(columns.group), f"column {columns.group!r}") or "", "the group")
