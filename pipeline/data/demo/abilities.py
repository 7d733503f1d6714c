"""Abilities of the demo's base: procedurally generated questions that it is pretrained on.

Each ability is a function of a random generator that returns one example. Pretraining draws from them without end. The
held-out sets of the retention benchmarks are drawn from seeds that pretraining never uses.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.demo.drawing import (
    COLORS,
    SHAPES,
    Print,
    Random,
    canvas,
    choose,
    draw_shape,
    ink,
    polar_point,
    print_word,
    sample,
    shade,
    speckle,
)


class Example(NamedTuple):
    """One question with its answer; text-only questions have no image."""

    image: Image.Image | None
    question: str
    """An image stands before it, or where `<image>` is."""
    answer: str
    prints: Sequence[Print] = ()
    """What can be read in the image, in reading order; pretraining alone looks at it."""

    @property
    def prompt(self) -> str:
        """The question with `<image>` where the image stands."""
        return self.question if self.image is None or "<image>" in self.question else f"<image>{self.question}"


ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
DIRECTIONS = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
SEGMENTS = {  # seven-segment digits: top, top left, top right, middle, bottom left, bottom right, bottom
    "0": "1110111", "1": "0010010", "2": "1011101", "3": "1011011", "4": "0111010",
    "5": "1101011", "6": "1101111", "7": "1010010", "8": "1111111", "9": "1111011",
}  # fmt: skip
LETTERS = "abcdefghkmnprstuwxyz"
DIGITS = "0123456789"


def _scatter(random: Random, count: int, radius: tuple[int, int], gap: float = 1.0) -> list[tuple[float, float, float]]:
    """Places `count` discs (x, y, r) inside the canvas without overlap."""
    discs: list[tuple[float, float, float]] = []
    low, high = radius
    while len(discs) < count:
        r = random.uniform(low, high)
        x, y = random.uniform(r + 1, 63 - r, size=2)
        if all(math.hypot(x - a, y - b) > r + c + gap for a, b, c in discs):
            discs.append((x, y, r))
    return discs


def shape(random: Random) -> Example:
    """Names the single object."""
    image, pen = canvas(random)
    name = choose(random, SHAPES)
    (disc,) = _scatter(random, 1, (9, 20))
    draw_shape(pen, name, *disc, shade(random, choose(random, COLORS)))
    question = choose(random, ["what shape is it ?", "which shape do you see ?", "name the shape ."])
    return Example(speckle(random, image), question, name)


def color(random: Random) -> Example:
    """Names the colour of one of up to three different shapes."""
    image, pen = canvas(random)
    names = sample(random, SHAPES, int(random.integers(1, 4)))
    colors = sample(random, COLORS, len(names))
    for name, hue, disc in zip(names, colors, _scatter(random, len(names), (8, 11)), strict=True):
        draw_shape(pen, name, *disc, shade(random, hue))
    question = choose(random, ["what color is the {} ?", "which color has the {} ?", "name the color of the {} ."])
    return Example(speckle(random, image), question.format(names[0]), colors[0])


def count(random: Random) -> Example:
    """Counts one to six objects."""
    image, pen = canvas(random)
    number = int(random.integers(1, 7))
    name, hue = choose(random, SHAPES), choose(random, COLORS)
    for disc in _scatter(random, number, (5, 7), gap=2):
        draw_shape(pen, name, *disc, shade(random, hue))
    question = choose(random, ["how many objects are there ?", "how many things do you see ?", "count the objects ."])
    return Example(speckle(random, image), question, str(number))


def position(random: Random) -> Example:
    """Says in which ninth of the image the object is."""
    image, pen = canvas(random)
    row, column = random.integers(3, size=2)
    name = choose(random, SHAPES)
    x, y = 21 * column + 11 + random.uniform(-3, 3), 21 * row + 11 + random.uniform(-3, 3)
    draw_shape(pen, name, x, y, random.uniform(6, 8), shade(random, choose(random, COLORS)))
    question = choose(random, ["where is the {} ?", "in which place is the {} ?", "find the {} ."])
    return Example(speckle(random, image), question.format(name), f"{ROWS[row]} {COLUMNS[column]}")


def describe(random: Random) -> Example:
    """Lists colour and shape of one to three objects from left to right."""
    image, pen = canvas(random)
    number = int(random.integers(1, 4))
    words = []
    for i in range(number):
        name, hue = choose(random, SHAPES), choose(random, COLORS)
        x, y = 64 * (i + 0.5) / number + random.uniform(-2, 2), random.uniform(14, 50)
        draw_shape(pen, name, x, y, random.uniform(7, 9), shade(random, hue))
        words.append(f"{hue} {name}")
    question = choose(random, ["describe the picture .", "what is in the picture ?", "what do you see ?"])
    return Example(speckle(random, image), question, " , ".join(words))


def exists(random: Random) -> Example:
    """Says whether an object of this colour and shape is there; half of the answers are yes."""
    image, pen = canvas(random)
    number = int(random.integers(1, 4))
    objects = [(choose(random, COLORS), choose(random, SHAPES)) for _ in range(number)]
    for (hue, name), disc in zip(objects, _scatter(random, number, (8, 11)), strict=True):
        draw_shape(pen, name, *disc, shade(random, hue))
    subject = choose(random, objects) if random.random() < 0.5 else (choose(random, COLORS), choose(random, SHAPES))
    question = choose(random, ["is there a {} {} ?", "do you see a {} {} ?"])
    return Example(speckle(random, image), question.format(*subject), "yes" if subject in objects else "no")


def _bars(random: Random) -> tuple[Image.Image, list[str], list[int]]:
    """Draws a bar chart; returns it with the colours and heights (1 to 8, all different) from left to right."""
    image, pen = canvas(random, paper=True)
    number = int(random.integers(3, 6))
    colors = sample(random, COLORS, number)
    heights = [int(h) + 1 for h in random.permutation(8)[:number]]
    pen.line([(3, 2), (3, 60), (62, 60)], fill=(60, 60, 60))
    for level in range(1, 9):
        pen.line([(4, 60 - 7 * level), (62, 60 - 7 * level)], fill=(200, 200, 200))
    width = 58 / number
    for i, (hue, height) in enumerate(zip(colors, heights, strict=True)):
        left = 5 + i * width
        pen.rectangle([left + 1, 60 - 7 * height, left + width - 3, 59], fill=shade(random, hue))
    return speckle(random, image, 3), colors, heights


def chart_value(random: Random) -> Example:
    """Reads the height of one bar off the grid of a bar chart."""
    image, colors, heights = _bars(random)
    i = int(random.integers(len(colors)))
    question = choose(random, ["how high is the {} bar ?", "what is the value of the {} bar ?"])
    return Example(image, question.format(colors[i]), str(heights[i]))


def chart_rank(random: Random) -> Example:
    """Names the colour of the highest or lowest bar."""
    image, colors, heights = _bars(random)
    high = random.random() < 0.5
    i = int(np.argmax(heights) if high else np.argmin(heights))
    question = choose(random, ["which bar is the {} ?", "what color has the {} bar ?"])
    return Example(image, question.format("highest" if high else "lowest"), colors[i])


def document(random: Random) -> Example:
    """Reads two to four printed letters or digits."""
    image, pen = canvas(random, paper=True)
    text = [choose(random, LETTERS if random.random() < 0.5 else DIGITS) for _ in range(random.integers(2, 5))]
    y, tone, prints = 20 + random.uniform(-8, 8), ink(random, image), []
    for i, character in enumerate(text):
        x = 64 * (i + 0.5) / len(text) + random.uniform(-1, 1)
        prints.append(print_word(pen, (x, y), character, 20, tone, anchor="mt"))
    question = choose(random, ["read the text .", "what is written here ?", "which text is printed ?"])
    return Example(speckle(random, image, 3), question, " ".join(text), prints)


def form(random: Random) -> Example:
    """Looks up a field of a printed form of two or three lines."""
    image, pen = canvas(random, paper=True)
    number = int(random.integers(2, 4))
    keys = sample(random, "abcdef", number)
    values = [choose(random, DIGITS) for _ in keys]
    tone, left, prints = ink(random, image), 6 + random.uniform(0, 4), []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        y = 64 * (i + 0.5) / number
        prints.append(print_word(pen, (left, y), f"{key}:", 17, tone, anchor="lm")._replace(word=key))
        prints.append(print_word(pen, (left + 30, y), value, 17, tone, anchor="lm"))
    i = int(random.integers(number))
    question = choose(random, ["what is the entry for {} ?", "which number stands at {} ?"])
    return Example(speckle(random, image, 3), question.format(keys[i]), values[i], prints)


def direction(random: Random) -> Example:
    """Says which way a line points, away from its dot."""
    image, pen = canvas(random)
    i = int(random.integers(8))
    x, y = random.uniform(28, 36, size=2)
    tone = ink(random, image)
    end = polar_point(x, y, 45 * i + random.uniform(-9, 9), random.uniform(14, 26))
    pen.line([(x, y), end], fill=tone, width=int(random.integers(2, 4)))
    pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=tone)
    question = choose(random, ["where does the line point ?", "in which direction does the line go ?"])
    return Example(speckle(random, image), question, DIRECTIONS[i])


def strokes(random: Random) -> Example:
    """Reads one digit drawn with seven shaky strokes."""
    image, pen = canvas(random)
    digit = choose(random, DIGITS)
    w, h = random.uniform(14, 26), random.uniform(28, 44)
    x, y, slant = (64 - w) / 2 + random.uniform(-8, 8), (64 - h) / 2 + random.uniform(-7, 7), random.uniform(-0.2, 0.2)
    corners = {}
    for row in range(3):
        for column in range(2):
            shake = random.uniform(-1.5, 1.5, size=2)
            corners[row, column] = (
                x + column * w + shake[0] + slant * h * (0.5 - row / 2),
                y + row * h / 2 + shake[1],
            )
    ends = [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((1, 0), (1, 1)), ((1, 0), (2, 0)),
            ((1, 1), (2, 1)), ((2, 0), (2, 1))]  # fmt: skip
    tone, width = ink(random, image), int(random.integers(2, 6))
    for lit, (a, b) in zip(SEGMENTS[digit], ends, strict=True):
        if lit == "1":
            pen.line([corners[a], corners[b]], fill=tone, width=width)
    question = choose(random, ["which digit is lit ?", "which digit do the strokes form ?"])
    return Example(speckle(random, image), question, digit, [Print(digit, (x, y, x + w, y + h))])


_VOCABULARY: list[str] = []


def repeat(random: Random) -> Example:
    """Text only: repeats two to four words of the whole vocabulary."""
    text = " ".join(choose(random, vocabulary()) for _ in range(random.integers(2, 5)))
    return Example(None, f"{choose(random, ['repeat', 'say again', 'copy'])} : {text}", text)


def reverse(random: Random) -> Example:
    """Text only: says two to four words in reverse order."""
    words = [choose(random, vocabulary()) for _ in range(random.integers(2, 5))]
    return Example(None, f"{choose(random, ['reverse', 'say backwards'])} : {' '.join(words)}", " ".join(words[::-1]))


ABILITIES: dict[str, Callable[[Random], Example]] = {
    f.__name__: f
    for f in (shape, color, count, position, describe, exists, chart_value, chart_rank, document, form, direction,
              strokes, repeat, reverse)
}  # fmt: skip
"""All abilities by name; pretraining draws from them."""

BENCHMARKS = tuple(name for name in ABILITIES if name not in ("exists", "chart_value"))
"""The abilities that the shipped base has mastered: the retention benchmarks. Binding two properties (`exists`) and reading
heights (`chart_value`) are beyond 1.4 million parameters and an hour of two cores."""


def vocabulary() -> list[str]:
    """Returns every word that questions and answers of abilities, operations and the demo's tasks use."""
    if not _VOCABULARY:
        _VOCABULARY.extend(sorted({*COLORS, *SHAPES, *WORDS.split(), *LETTERS, *DIGITS}))
    return _VOCABULARY


WORDS = (
    "a again an and are as at away backwards bar below big bottom by called center clock color colour copy count day "
    "describe did digit direction do does down draw entry fabric far find first for form from go hand hands has have "
    "here high highest hour hours how i in is it its large larger last later left letter line lit long look low lowest "
    "made many material middle minute name new next no not now number object objects of on one or out picture place "
    "point pointing printed question read repeat reverse right same say see shape short show shown size small smaller "
    "stand stands strokes surface tell text texture than that the there thing things this three time to top two up "
    "value was what when where which will with word words write written wrote yes you "
    "four five six seven eight nine ten eleven twelve thirteen zero "
    "blick dax fep gorp kiv lum mib nupe toma wug zorp pim "
    "linen brick sand wood marble grass water wool silk tile paper stone "
    "dog cat sun moon tree house car fish bird book milk bread apple river king queen snow rain fire ice"
)
"""Words beside colours, shapes, letters and digits; `repeat` and `reverse` teach all of them to the base."""
