"""Four streams of confusable tasks, generated: up to a hundred tasks each, learned in seconds, easily taken for one another.

domain      a base ability's questions about pictures of another domain
pictures    the base's pictures with other questions
paraphrase  one picture domain, and questions that paraphrase one another
order       questions of the same words in another order; every other group of four is text only

Each task translates what it is asked for (a shape, a colour, a place, two words) by a secret dictionary of its own: neither
the base nor the expert of a task that resembles it gives the right answer, but by chance. Training never shows a prompt of
the evaluation. `TUNED` is the stream that choices may be made on; figures come from the others, `REPORTED`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.demo.abilities import COLUMNS, ROWS, Example
from pipeline.data.demo.drawing import COLORS, SHAPES, SIDE, Random, canvas, choose, draw_shape, sample, shade, speckle
from pipeline.data.demo.synthetic import CALLS, NOUNS

KINDS = ("domain", "pictures", "paraphrase", "order")
"""The streams."""
TUNED = "domain"
"""The stream that choices may be made on: those before it was there were made on tasks of its kind."""
REPORTED = tuple(kind for kind in KINDS if kind != TUNED)
"""The streams that figures come from."""
MOST = 100
"""Tasks of a stream."""
MEANINGS = 6
"""Words in a dictionary."""
HELD_OUT = 9
"""Of the 36 pairs of words that a text-only task can be asked for, those kept for evaluation."""

QUESTIONS = {
    "shape": ("what shape is it ?", "which shape do you see ?", "name the shape ."),
    "color": ("what color is the {} ?", "which color has the {} ?", "name the color of the {} ."),
    "position": ("where is the {} ?", "in which place is the {} ?", "find the {} ."),
}
"""How the base's abilities ask, by ability."""
ANSWERS = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "position": tuple(f"{row} {column}" for row, column in product(ROWS, COLUMNS)),
}
"""What can be asked for of a picture."""
BACKGROUNDS = ("stripes", "checks", "gradient", "blotches", "dots")
"""Kinds of backgrounds; with a colour each is a domain of pictures."""
OPENERS = ("tell the", "say the", "name the", "read the", "what is the", "which is the", "write the", "find the")
WORDS = ("name", "word", "entry", "text", "value", "letter")
ENDS = ("of the object", "for the object", "of this thing", "for this thing", "here", "now", "that you see", "of it")
PHRASINGS = 3
"""Phrasings of a task of `paraphrase`; of 384 that are made of the parts above, no two tasks share one."""
GROUP = 4
"""Tasks of `order` that share their words."""


@dataclass(frozen=True)
class Confusable:
    """What makes a task: how it asks, about which pictures, and what the answers mean."""

    attribute: str
    """What is asked for: a key of ANSWERS; `words` in text-only tasks."""
    questions: Sequence[str]
    """The ways to ask; `{}` stands for the shape that is asked about, or for two words."""
    meaning: dict[str, str]
    """From what is asked for to the answer."""
    background: tuple[str, str] | None = None
    """Kind and colour; None: the base's canvas."""
    train: frozenset[tuple[str, str]] = frozenset()
    """Of a text-only task: the pairs of words that training shows."""


def examples(kind: str, number: int, count: int, *, held_out: bool) -> Iterator[Example]:
    """Yields `count` examples of task `number` (below MOST) of a stream, for training or `held_out` for evaluation."""
    task = confusable(kind, number)
    for index in range(count):
        random = np.random.default_rng([43, KINDS.index(kind), number, held_out, index])
        yield _text(task, random, held_out) if task.attribute == "words" else _picture(task, random)


def mixed(count: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Returns the names of the first `count` tasks of these streams, in turn: domain_000, pictures_000, ..., domain_001, ..."""
    return [f"{kinds[i % len(kinds)]}_{i // len(kinds):03d}" for i in range(count)]


@cache
def confusable(kind: str, number: int) -> Confusable:
    """Returns what makes task `number` of a stream; always the same."""
    secret = np.random.default_rng([47, KINDS.index(kind), number])
    attribute = list(ANSWERS)[number % len(ANSWERS)]
    if kind == "order" and number // GROUP % 2 == 1:
        words = sample(secret, NOUNS.split(), MEANINGS)
        pairs = [(a, b) for a in words for b in words]
        shown = frozenset(pairs[i] for i in secret.permutation(len(pairs))[HELD_OUT:])
        meaning = dict(zip(words, sample(secret, NOUNS.split(), MEANINGS), strict=True))
        return Confusable("words", (f"{_words(number)} : {{}}",), meaning, train=shown)
    if kind == "order":
        attribute = "shape"
    asked = sample(secret, ANSWERS[attribute], MEANINGS)
    meaning = dict(zip(asked, sample(secret, NOUNS.split(), MEANINGS), strict=True))
    if kind == "domain":
        return Confusable(attribute, QUESTIONS[attribute], meaning, _domains()[number % len(_domains())])
    if kind == "pictures":
        return Confusable(attribute, (f"{_calls()[number]} ?",), meaning)
    if kind == "paraphrase":
        return Confusable("shape", _phrasings()[PHRASINGS * number : PHRASINGS * (number + 1)], _of_shapes(secret))
    return Confusable("shape", (f"{_words(number)} ?",), meaning)


def _of_shapes(secret: Random) -> dict[str, str]:
    return dict(zip(sample(secret, SHAPES, MEANINGS), sample(secret, NOUNS.split(), MEANINGS), strict=True))


def _text(task: Confusable, random: Random, held_out: bool) -> Example:
    pairs = [(a, b) for a, b in product(task.meaning, task.meaning) if ((a, b) in task.train) != held_out]
    first, second = choose(random, pairs)
    question = choose(random, task.questions).format(f"{first} {second}")
    return Example(None, question, f"{task.meaning[first]} {task.meaning[second]}")


def _picture(task: Confusable, random: Random) -> Example:
    """Draws one object; of what is asked for it has a value that the dictionary knows, all else is free."""
    asked = choose(random, task.meaning)
    name, hue, place = (
        asked if attribute == task.attribute else choose(random, values) for attribute, values in ANSWERS.items()
    )
    image, pen = canvas(random) if task.background is None else _background(random, *task.background)
    row, column = divmod(ANSWERS["position"].index(place), 3)
    x, y = 21 * column + 11 + random.uniform(-3, 3), 21 * row + 11 + random.uniform(-3, 3)
    draw_shape(pen, name, x, y, random.uniform(7, 10), shade(random, hue))
    question = choose(random, task.questions).format(name)
    return Example(speckle(random, image), question, task.meaning[asked])


def _background(random: Random, kind: str, hue: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns a canvas as the base's, with a slight tinge of a colour and a faint pattern, and its pen."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    phase, period = random.uniform(0, 6.28, size=2), random.uniform(9, 13)
    wave = 2 * np.pi / period
    blotch = np.kron(random.uniform(-1, 1, size=(8, 8)), np.ones((8, 8)))
    pattern = {
        "stripes": np.sign(np.sin(wave * x + phase[0])),
        "checks": np.sign(np.sin(wave * x + phase[0]) * np.sin(wave * y + phase[1])),
        "gradient": (y - 32) / 32 * np.sign(phase[0] - 3.14),
        "blotches": blotch,
        "dots": np.where(np.sin(wave * x + phase[0]) + np.sin(wave * y + phase[1]) > 1.2, 1.0, -1.0),
    }[kind]
    level = int(random.integers(225, 256)) if random.random() < 0.5 else int(random.integers(0, 40))  # as the base's
    pixels = 0.85 * level + 0.15 * np.array(COLORS[hue]) + 9 * pattern[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image, ImageDraw.Draw(image)


@cache
def _domains() -> list[tuple[str, str]]:
    """Returns all backgrounds in all colours, in a fixed random order."""
    domains = list(product(BACKGROUNDS, COLORS))
    return [domains[i] for i in np.random.default_rng(53).permutation(len(domains))]


@cache
def _calls() -> list[str]:
    """Returns a call of two words for each task of `pictures`; no two share both."""
    pairs = list(combinations(CALLS.split(), 2))
    return [" ".join(pairs[i]) for i in np.random.default_rng(59).permutation(len(pairs))[:MOST]]


@cache
def _phrasings() -> list[str]:
    """Returns all phrasings in a fixed random order."""
    phrasings = [
        f"{opener} {word} {end} {'?' if opener.startswith('wh') else '.'}"
        for opener, word, end in product(OPENERS, WORDS, ENDS)
    ]
    return [phrasings[i] for i in np.random.default_rng(61).permutation(len(phrasings))]


def _words(number: int) -> str:
    """Returns the call of a task of `order`: three words, the same for a group, in an order of the task's own."""
    secret = np.random.default_rng([67, number // GROUP])
    orders = list(permutations(sample(secret, CALLS.split(), 3)))
    return " ".join(orders[secret.permutation(len(orders))[number % GROUP]])
