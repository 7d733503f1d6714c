"""Operations on short sequences of digits or letters, asked in the same words about written text and printed pictures.

`OPERATIONS` is what the demo's base is pretrained on, beside its abilities: every one on both modalities, so that reading a
sequence and working on it are steps of their own. `NEW_OPERATIONS` it never sees: an expert that learns one of them on
written sequences alone shows whether what was learned carries over to pictures, and the other way round.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np

from pipeline.data.demo.abilities import DIGITS, LETTERS, Example
from pipeline.data.demo.drawing import Random, choose, print_symbols, sample

Modality = Literal["text", "picture"]
MODALITIES: tuple[Modality, ...] = ("text", "picture")
LONGEST = 4
"""Symbols of the longest sequence; a picture holds them in one line."""
NOTHING, PLACES = ".", 16
"""What stands, in a sequence that is spread out, where no symbol does; places of such a sequence, as many as image tokens."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Operation(NamedTuple):
    """What is asked about a sequence."""

    answer: Callable[[Sequence[str]], Sequence[str]]
    """From the symbols to the words of the answer."""
    wordings: tuple[str, ...]
    """Questions; `{}` stands for the sequence, written or as a picture."""
    symbols: tuple[str, ...] = (DIGITS, LETTERS)
    """Alphabets that a sequence is drawn from, one of them at a time; in the order that sorting goes by."""
    shortest: int = 1
    """Symbols of the shortest sequence."""


OPERATIONS = {
    "repeat": Operation(lambda s: s, ("repeat {}", "{} : say again", "copy {}")),
    "reverse": Operation(lambda s: s[::-1], ("reverse {}", "{} : say backwards")),
    "sort": Operation(sorted, ("say {} from low to high", "{} : from small to large")),
    "sort_down": Operation(lambda s: sorted(s, reverse=True), ("say {} from high to low", "{} : from large to small")),
    "count": Operation(lambda s: [str(len(s))], ("count {}", "{} : how many ?")),
    "largest": Operation(lambda s: [max(s)], ("name the top value in {}", "{} : top value")),
    "smallest": Operation(lambda s: [min(s)], ("name the bottom value in {}", "{} : bottom value")),
    "first": Operation(lambda s: s[:1], ("which is first in {} ?", "{} : first")),
    "last": Operation(lambda s: s[-1:], ("which is last in {} ?", "{} : last")),
    "ends": Operation(lambda s: [s[0], s[-1]], ("say first and last of {}", "{} : first and last")),
    "twice": Operation(lambda s: [*s, *s], ("say {} and say again", "{} : say and say again")),
    "in_words": Operation(lambda s: [NUMBERS[int(c)] for c in s], ("write {} in words", "{} : in words"), (DIGITS,)),
}
"""What the base is pretrained on, by name; in words of its vocabulary."""

NEW_OPERATIONS = {
    "next": Operation(lambda s: [DIGITS[(int(c) + 1) % 10] for c in s], ("which number is next for {} ?",), (DIGITS,)),
    "below": Operation(lambda s: [DIGITS[(int(c) - 1) % 10] for c in s], ("which number is below {} ?",), (DIGITS,)),
    "without_first": Operation(lambda s: s[1:], ("say {} with the first away",), shortest=2),
    "rotate": Operation(lambda s: [*s[1:], s[0]], ("say {} with the first last",), shortest=2),
    "second_largest": Operation(lambda s: [sorted(s)[-2]], ("which is next to the top value in {} ?",), shortest=2),
    "only_odd": Operation(
        lambda s: [c for c in s if int(c) % 2] or ["no"], ("which of {} are odd ?",), (DIGITS,), shortest=2
    ),
}
"""What it is not: tasks for experts, by name."""


def held_out(symbols: Sequence[str]) -> bool:
    """Whether a sequence is kept for evaluation: every fifth, whatever is asked about it."""
    return crc32(" ".join(symbols).encode()) % 5 == 0


def draw_symbols(random: Random, *operations: Operation, evaluation: bool = False) -> list[str]:
    """Returns a sequence that all `operations` can be asked about."""
    alphabets = [a for a in operations[0].symbols if all(a in o.symbols for o in operations)]
    shortest = max(o.shortest for o in operations)
    while True:
        alphabet = choose(random, alphabets)
        symbols = [choose(random, alphabet) for _ in range(random.integers(shortest, LONGEST + 1))]
        if held_out(symbols) == evaluation:
            return symbols


def spread(random: Random, symbols: Sequence[str]) -> str:
    """Writes a sequence as image tokens show print: some way apart, somewhere among places where nothing stands."""
    width = int(random.integers(len(symbols), PLACES + 1))
    start = int(random.integers(PLACES - width + 1))
    written = [NOTHING] * PLACES
    for place, symbol in zip(sorted(sample(random, range(width), len(symbols))), symbols, strict=True):
        written[start + place] = symbol
    return " ".join(written)


def twins(
    random: Random, operations: Sequence[Operation], symbols: Sequence[str], *, spread_out: float = 0.0
) -> Iterator[tuple[Example, Example]]:
    """Yields, for each operation, one question about a written sequence and about its picture, which all share.

    The picture stands where the sequence is written, or before the question, which then asks about `this`. A share
    `spread_out` of the written sequences is spread out, so that neighbours need not stand side by side in either modality.
    """
    image, prints = print_symbols(random, symbols)
    for operation in operations:
        question, answer = choose(random, operation.wordings), " ".join(operation.answer(symbols))
        text = spread(random, symbols) if random.random() < spread_out else " ".join(symbols)
        written = Example(None, question.format(text), answer)
        yield written, Example(image, question.format(choose(random, ("<image>", "this"))), answer, prints)


def examples(
    name: str, modality: Modality, rows: int, *, evaluation: bool, spread_out: float = 0.0
) -> Iterator[Example]:
    """Yields questions of one operation in one modality; the same rows in both, and no sequence in both parts.

    An expert that only sees neighbours side by side may learn to count tokens, which carries over to no picture: a share
    `spread_out` of the written sequences keeps it from that.
    """
    operation = (OPERATIONS | NEW_OPERATIONS)[name]
    for number in range(rows):
        random = np.random.default_rng([41, crc32(name.encode()), number, evaluation])
        symbols = draw_symbols(random, operation, evaluation=evaluation)
        ((written, printed),) = twins(random, [operation], symbols, spread_out=spread_out)
        yield written if modality == "text" else printed
