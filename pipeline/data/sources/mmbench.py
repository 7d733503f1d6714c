"""MMBench's files as rows: the published prompt, shared images, and circular evaluation.

- A question with N options is asked N times, its options rotated by one place each time, and counts as right only if all N
  answers are (CircularEval; Liu et al. 2023, arXiv 2307.06281). Rotation r of question `index` is row `index` + r * 10^6.
- Files that already hold these rotations (most published ones do) stay as they are, others are rotated here.
- A row may name another row's index instead of repeating its image.
- Independent of file formats.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from string import ascii_uppercase
from typing import Any

from pipeline.data.errors import UnreadableRow
from pipeline.data.sources.formats import Row

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""Instruction below the options, as in the evaluations of LLaVA and InternVL."""

COLUMNS = frozenset({"index", "question", "hint", "answer", "image", *ascii_uppercase})
"""Columns that are read."""

_ROTATION = 1_000_000
"""Difference between the indices of consecutive rotations of a question."""

_REFERENCE = 64
"""Images shorter than this are another row's index (MMBench's convention)."""

Numbered = tuple[str, int, Row]
"""File, number in it, row."""


def questions(
    read_rows: Callable[[], Iterable[Numbered]], limit: int | None, *, answered: bool = True
) -> Iterator[Numbered]:
    """Yields rows with `index`, `question` (the whole prompt), `answer` (a letter), `choices`, `image` and `group`.

    `read_rows` reads all rows of a source anew: first to find rotations and shared images, then for the rows. `limit` counts
    rows, but takes whole questions with all their rotations, at least one. Without `answered`, those without an answer (test
    splits) have None.
    """
    sizes, shared = Counter[int](), set[str]()
    rotated = False
    for _, _, row in read_rows():
        if isinstance(row, dict) and (index := _index(row)) is not None:
            sizes[index % _ROTATION] += 1
            rotated |= index >= _ROTATION
            shared |= {_reference(row)} - {""}
    images = _images(read_rows(), shared) if shared else {}
    seen, chosen, total = set[int](), set[int](), 0
    for file, number, row in read_rows():
        index = _index(row) if isinstance(row, dict) else None
        turns: list[Row]
        if isinstance(row, UnreadableRow):
            turns = [row]
        elif index is None:
            turns = [
                UnreadableRow("column 'index' is missing or no number (preset mmbench)", _text(row.get("question")))
            ]
        elif index in seen:
            turns = [
                UnreadableRow(
                    f"index {index} stands twice; a source holds one language and split", _text(row.get("question"))
                )
            ]
        else:
            seen.add(index)
            row = row | {"image": images.get(_reference(row), row.get("image"))}
            turns = (
                [render_question(row, index, 0, answered=answered)]
                if rotated
                else rotations(row, index, answered=answered)
            )
        group = number if index is None else index % _ROTATION
        if limit is not None and group not in chosen:
            size = sizes[group] if rotated else len(turns)
            if chosen and total + size > limit:
                continue
            chosen.add(group)
            total += size
        yield from ((file, number, turn) for turn in turns)


def rotations(row: dict[str, Any], index: int, *, answered: bool = True) -> list[Row]:
    """Returns a question once per rotation of its options; one UnreadableRow where it cannot be used."""
    first = render_question(row, index, 0, answered=answered)
    if isinstance(first, UnreadableRow):
        return [first]
    return [first, *(render_question(row, index, by, answered=answered) for by in range(1, len(first["choices"])))]


def render_question(row: dict[str, Any], index: int, by: int, *, answered: bool = True) -> Row:
    """Returns a question with its options rotated by `by` places, with answer, choices and group."""
    options = _options(row)
    letters, texts = list(options), list(options.values())
    letter = _text(row.get("answer")).upper()
    if reference := _reference(row):
        return UnreadableRow(f"question {index} shares the image of row {reference}, which has none")
    if not options:
        return UnreadableRow(f"question {index} has no options (columns A, B, ...)")
    if answered and not letter:
        return UnreadableRow(f"question {index} has no answer (a test split, whose answers are not public?)")
    if letter and letter not in options:
        return UnreadableRow(
            f"question {index}: its answer {letter[:20]!r} is not the letter of an option ({', '.join(letters)})"
        )
    right = letters[(letters.index(letter) - by) % len(letters)] if letter else None
    choices = dict(zip(letters, texts[by:] + texts[:by], strict=True))
    parts = [_text(row.get("hint")), _text(row.get("question"))]
    if not parts[1]:
        return UnreadableRow(f"question {index} is empty")
    lines = [part for part in parts if part] + [f"{name}. {text}" for name, text in choices.items()] + [INSTRUCTION]
    return {
        "index": index + by * _ROTATION,
        "question": "\n".join(lines),
        "answer": right,
        "choices": choices,
        "image": row.get("image"),
        "group": str(index % _ROTATION),
    }


def _index(row: dict[str, Any]) -> int | None:
    try:
        return int(float(row["index"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _text(value: Any) -> str:
    """Returns a cell's text; empty for a missing one, which tables also write as `nan`."""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "nan" else text


def _options(row: dict[str, Any]) -> dict[str, str]:
    return {letter: text for letter in ascii_uppercase if (text := _text(row.get(letter)))}


def _reference(row: dict[str, Any]) -> str:
    """Returns the index of the row whose image this row shares; empty where it has its own."""
    image = row.get("image")
    text = str(image).strip() if isinstance(image, (str, int)) else ""
    return text if text.isdecimal() and len(text) <= _REFERENCE else ""


def _images(rows: Iterable[Numbered], shared: set[str]) -> dict[str, Any]:
    """Returns the images of rows by the index that other rows refer to them with."""
    with_image = ((str(_index(row)), row) for _, _, row in rows if isinstance(row, dict) and not _reference(row))
    return {index: row.get("image") for index, row in with_image if index in shared}
