"""Two streams whose tasks resemble what the base can do: its own questions about other pictures, other words for the same.

`TUNED` is the stream that choices were made on, `REPORTED` the one that figures come from: it was never used to choose
anything. Only prompts matter here (nobody is trained), so answers are left empty.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from pipeline.data.demo.abilities import DIGITS, LETTERS, SEGMENTS, Example
from pipeline.data.demo.drawing import (
    COLORS,
    SHAPES,
    SIDE,
    Random,
    canvas,
    choose,
    draw_shape,
    font,
    ink,
    polar_point,
    sample,
    shade,
    speckle,
)

Draw = Callable[[Random], Example]


def _gradient(random: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns a picture whose background runs from one tone to another, and its pen."""
    ends = random.integers(30, 226, size=(2, 3))
    share = np.linspace(0, 1, SIDE)[:, None, None]
    pixels = np.broadcast_to((1 - share) * ends[0] + share * ends[1], (SIDE, SIDE, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    return image, ImageDraw.Draw(image)


# The tuned stream: four questions of the base's families `shape`, `color` and `count`, about other pictures.


def outlined_shape(random: Random) -> Example:
    """Asks `shape`'s questions about a shape that is only a thin line around nothing."""
    image, pen = canvas(random)
    name, r, tone = choose(random, SHAPES), random.uniform(12, 22), shade(random, choose(random, COLORS))
    x, y = random.uniform(r + 1, 63 - r, size=2)
    draw_shape(pen, name, x, y, r, tone)
    level = int(np.asarray(image)[0, 0, 0])
    draw_shape(pen, name, x, y, 0.75 * r, (level, level, level))
    question = choose(random, ["what shape is it ?", "which shape do you see ?", "name the shape ."])
    return Example(speckle(random, image), question, "")


def striped_color(random: Random) -> Example:
    """Asks `color`'s questions about shapes behind stripes."""
    image, pen = canvas(random)
    names = sample(random, SHAPES, int(random.integers(1, 4)))
    for i, name in enumerate(names):
        x, y = 64 * (i + 0.5) / len(names), random.uniform(14, 50)
        draw_shape(pen, name, x, y, random.uniform(8, 11), shade(random, choose(random, COLORS)))
    tone, first = ink(random, image), int(random.integers(4))
    for x in range(first, SIDE, 6):
        pen.line([(x, 0), (x, SIDE)], fill=tone)
    question = choose(random, ["what color is the {} ?", "which color has the {} ?", "name the color of the {} ."])
    return Example(speckle(random, image), question.format(names[0]), "")


def shaded_shape(random: Random) -> Example:
    """Asks `shape`'s questions before a background that changes from one colour to another."""
    image, pen = _gradient(random)
    r = random.uniform(9, 20)
    x, y = random.uniform(r + 1, 63 - r, size=2)
    draw_shape(pen, choose(random, SHAPES), x, y, r, shade(random, choose(random, COLORS)))
    question = choose(random, ["what shape is it ?", "which shape do you see ?", "name the shape ."])
    return Example(speckle(random, image), question, "")


def nested_count(random: Random) -> Example:
    """Asks `count`'s questions about rings inside rings."""
    image, pen = canvas(random)
    number = int(random.integers(2, 7))
    x, y = random.uniform(28, 36, size=2)
    for r in np.linspace(26, 5, number):
        tone = shade(random, choose(random, COLORS))
        pen.ellipse([x - r, y - r, x + r, y + r], outline=tone, width=2)
    question = choose(random, ["how many objects are there ?", "how many things do you see ?", "count the objects ."])
    return Example(speckle(random, image), question, "")


# The reported stream: ten tasks that resemble other families, or one another.


def hidden_position(random: Random) -> Example:
    """Asks `position`'s questions about a shape on coarse noise."""
    coarse = Image.fromarray(random.integers(60, 200, size=(8, 8, 3)).astype(np.uint8))
    image = coarse.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    name = choose(random, SHAPES)
    x, y = random.uniform(10, 54, size=2)
    draw_shape(ImageDraw.Draw(image), name, x, y, random.uniform(6, 8), shade(random, choose(random, COLORS)))
    question = choose(random, ["where is the {} ?", "in which place is the {} ?", "find the {} ."])
    return Example(speckle(random, image), question.format(name), "")


def lying_rank(random: Random) -> Example:
    """Asks `chart_rank`'s questions about bars that lie."""
    image, pen = canvas(random, paper=True)
    number = int(random.integers(3, 6))
    lengths, width = random.permutation(8)[:number] + 1, 58 / number
    for i, (hue, length) in enumerate(zip(sample(random, COLORS, number), lengths, strict=True)):
        pen.rectangle([4, 3 + i * width, 4 + 7 * length, i * width + width], fill=shade(random, hue))
    question = choose(random, ["which bar is the {} ?", "what color has the {} bar ?"])
    return Example(speckle(random, image, 3), question.format(choose(random, ["highest", "lowest"])), "")


def tilted_document(random: Random) -> Example:
    """Asks `document`'s questions about coloured text that climbs or falls."""
    image, pen = canvas(random, paper=True)
    text = [choose(random, LETTERS if random.random() < 0.5 else DIGITS) for _ in range(random.integers(2, 5))]
    tone, slope = shade(random, choose(random, COLORS)), random.choice([-1, 1]) * random.uniform(8, 14)
    for i, character in enumerate(text):
        x, y = 64 * (i + 0.5) / len(text), 22 + slope * (i - (len(text) - 1) / 2)
        pen.text((x, y), character.upper(), fill=tone, font=font(18), anchor="mt")
    question = choose(random, ["read the text .", "what is written here ?", "which text is printed ?"])
    return Example(speckle(random, image, 3), question, "")


def negative_form(random: Random) -> Example:
    """Asks `form`'s questions about light text on coloured paper."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(c // 2 for c in shade(random, choose(random, COLORS))))
    pen, number = ImageDraw.Draw(image), int(random.integers(2, 4))
    keys = sample(random, "abcdef", number)
    left = 6 + random.uniform(0, 4)
    for i, key in enumerate(keys):
        y = 64 * (i + 0.5) / number
        pen.text((left, y), f"{key.upper()}:", fill=(245, 245, 245), font=font(17), anchor="lm")
        pen.text((left + 30, y), choose(random, DIGITS), fill=(245, 245, 245), font=font(17), anchor="lm")
    question = choose(random, ["what is the entry for {} ?", "which number stands at {} ?"])
    return Example(speckle(random, image, 3), question.format(keys[0]), "")


def arrow_direction(random: Random) -> Example:
    """Asks `direction`'s questions about a bold coloured arrow without a dot."""
    image, pen = canvas(random)
    degrees, tone = 45 * int(random.integers(8)), shade(random, choose(random, COLORS))
    x, y = random.uniform(28, 36, size=2)
    tip = polar_point(x, y, degrees, 24)
    pen.line([polar_point(x, y, degrees + 180, 18), tip], fill=tone, width=5)
    pen.polygon(
        [polar_point(*tip, degrees, 6), polar_point(*tip, degrees + 130, 12), polar_point(*tip, degrees - 130, 12)],
        fill=tone,
    )
    question = choose(random, ["where does the line point ?", "in which direction does the line go ?"])
    return Example(speckle(random, image), question, "")


def paired_strokes(random: Random) -> Example:
    """Asks `strokes`' questions about two small digits side by side."""
    image, pen = canvas(random)
    tone = ink(random, image)
    for left in (8 + random.uniform(-3, 3), 38 + random.uniform(-3, 3)):
        w, h, top = random.uniform(12, 18), random.uniform(22, 32), random.uniform(10, 24)
        points = [[(left + w * c, top + h * r / 2) for c in range(2)] for r in range(3)]
        ends = [(0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 0, 2, 0), (1, 1, 2, 1), (2, 0, 2, 1)]
        for lit, (a, b, c, d) in zip(SEGMENTS[choose(random, DIGITS)], ends, strict=True):
            if lit == "1":
                pen.line([points[a][b], points[c][d]], fill=tone, width=3)
    question = choose(random, ["which digit is lit ?", "which digit do the strokes form ?"])
    return Example(speckle(random, image), question, "")


def repeat_numbers(random: Random) -> Example:
    """Text only: asks `repeat`'s questions about digits alone, more of them."""
    words = " ".join(choose(random, DIGITS) for _ in range(random.integers(4, 7)))
    return Example(None, f"{choose(random, ['repeat', 'say again', 'copy'])} : {words}", "")


def reverse_letters(random: Random) -> Example:
    """Text only: asks `reverse`'s questions about letters alone, more of them."""
    words = " ".join(choose(random, LETTERS) for _ in range(random.integers(4, 7)))
    return Example(None, f"{choose(random, ['reverse', 'say backwards'])} : {words}", "")


def _dial(random: Random) -> Image.Image:
    """Draws a square clock with one hand."""
    image, pen = canvas(random)
    tone, (x, y) = ink(random, image), random.uniform(29, 35, size=2)
    pen.rectangle([x - 25, y - 25, x + 25, y + 25], outline=tone, width=2)
    pen.line([(x, y), polar_point(x, y, 30 * int(random.integers(12)), 20)], fill=tone, width=3)
    return speckle(random, image)


def dial_hour(random: Random) -> Example:
    """Asks for the hour of a square clock, in several ways."""
    questions = ["which hour does it show ?", "what hour is it ?", "tell the hour of the clock ."]
    return Example(_dial(random), choose(random, questions), "")


def dial_next(random: Random) -> Example:
    """Asks for the hour after that of the same clocks, in several ways that use the same words and more."""
    questions = [
        "which hour does it show next ?",
        "what hour is it one hour later ?",
        "tell the hour after the clock .",
    ]
    return Example(_dial(random), choose(random, questions), "")


TUNED: dict[str, Draw] = {f.__name__: f for f in (outlined_shape, striped_color, shaded_shape, nested_count)}
"""Joined to the demo's stream's six tasks they make the stream of ten that choices were made on."""

REPORTED: dict[str, Draw] = {
    f.__name__: f
    for f in (hidden_position, lying_rank, tilted_document, negative_form, arrow_direction, paired_strokes,
              repeat_numbers, reverse_letters, dial_hour, dial_next)
}  # fmt: skip
"""The stream of ten that figures come from."""


def examples(task: str, count: int, *, held_out: bool) -> list[Example]:
    """Returns `count` prompts of a task of either stream, to take statistics of or kept for routing."""
    tasks = TUNED | REPORTED
    return [tasks[task](np.random.default_rng([41, list(tasks).index(task), held_out, i])) for i in range(count)]
