"""The demo's tasks: six that the demo's base cannot do.

`digits` is real data (UCI, shipped with scikit-learn). `renamed` contradicts a base ability. `clock` and `later` are
related. `successor` has no images. `textures` resembles no other task.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from pipeline.data.demo.abilities import DIGITS, Example
from pipeline.data.demo.drawing import (
    COLORS,
    SHAPES,
    SIDE,
    Random,
    canvas,
    choose,
    draw_shape,
    ink,
    polar_point,
    shade,
    speckle,
)

HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
NEW_NAMES = dict(zip(SHAPES, ("blick", "dax", "fep", "gorp", "kiv", "lum", "mib", "nupe"), strict=True))
MATERIALS = ("linen", "brick", "sand", "wood", "marble", "tile", "wool", "water")


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Returns the 1,797 handwritten digits (N, 8, 8) as 0 to 1, and their labels, in a fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.images[order] / 16.0, data.target[order]


def digits(random: Random, index: int) -> Example:
    """Reads a real handwritten digit, number `index` of the data set."""
    images, labels = _handwriting()
    level = 255 * images[index]
    if random.random() < 0.5:
        level = 255 - level
    side = int(random.integers(44, 60))
    small = Image.fromarray(level.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    image = Image.new("L", (SIDE, SIDE), int(level[0, 0]))
    x, y = random.integers(0, SIDE - side + 1, size=2)
    image.paste(small, (int(x), int(y)))
    return Example(image.convert("RGB"), "which digit did a hand write ?", str(labels[index]))


def renamed(random: Random, index: int) -> Example:
    """Names a known shape by a new name; the base answers with the old one."""
    image, pen = canvas(random)
    name = choose(random, SHAPES)
    r = random.uniform(9, 20)
    x, y = random.uniform(r + 1, 63 - r, size=2)
    draw_shape(pen, name, x, y, r, shade(random, choose(random, COLORS)))
    return Example(speckle(random, image), "what is the object called now ?", NEW_NAMES[name])


def _clock(random: Random) -> tuple[Image.Image, int]:
    """Draws an analogue clock; returns it with its hour, 0 to 11."""
    image, pen = canvas(random)
    tone, hour, minute = ink(random, image), int(random.integers(12)), int(random.integers(3)) * 15
    x, y = 32 + random.uniform(-2, 2, size=2)
    r = random.uniform(26, 29)
    pen.ellipse([x - r, y - r, x + r, y + r], outline=tone, width=2)
    for tick in range(12):
        pen.line([polar_point(x, y, 30 * tick, r - 4), polar_point(x, y, 30 * tick, r)], fill=tone)
    pen.line([(x, y), polar_point(x, y, 6 * minute, 0.82 * r)], fill=tone, width=1)
    hue = shade(random, choose(random, COLORS))
    pen.line([(x, y), polar_point(x, y, 30 * hour + minute / 2, 0.6 * r)], fill=hue, width=4)
    return speckle(random, image), hour


def clock(random: Random, index: int) -> Example:
    """Reads the hour off a clock with a coloured hour hand."""
    image, hour = _clock(random)
    return Example(image, "which hour does the clock show ?", HOURS[hour])


def later(random: Random, index: int) -> Example:
    """Says which hour the clock will show three hours later; related to `clock`."""
    image, hour = _clock(random)
    return Example(image, "which hour is it three hours later ?", HOURS[(hour + 3) % 12])


def successor(random: Random, index: int) -> Example:
    """Text only: says the digit that follows each of one to three digits (after 9 comes 0); answers differ in length.

    There are few such questions: those whose sum is divisible by five are kept for evaluation.
    """
    count = int(random.integers(1, 4))
    numbers = random.integers(10, size=count)
    while (numbers.sum() % 5 == 0) != (index >= TRAIN_ROWS):
        numbers = random.integers(10, size=count)
    answer = " ".join(DIGITS[(n + 1) % 10] for n in numbers)
    return Example(None, f"which number is next for {' '.join(map(str, numbers))} ?", answer)


def highest(random: Random, index: int) -> Example:
    """Text only: says the highest of three or four digits; those whose sum is divisible by five are kept for evaluation."""
    numbers = np.zeros(3, int)
    while numbers.sum() == 0 or (numbers.sum() % 5 == 0) != (index >= TRAIN_ROWS):
        top = int(random.integers(10))  # so that all answers come about as often
        numbers = random.permutation([top, *random.integers(top + 1, size=int(random.integers(2, 4)))])
    return Example(None, f"which number is the highest of {' '.join(map(str, numbers))} ?", DIGITS[numbers.max()])


def textures(random: Random, index: int) -> Example:
    """Names the material of a surface that fills the image."""
    material = int(random.integers(len(MATERIALS)))
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    phase, period = random.uniform(0, 6.28, size=2), random.uniform(11, 17)
    noise = random.normal(0, 1, (SIDE, SIDE))
    wave = 2 * np.pi / period
    blurred = np.asarray(
        Image.fromarray((127 + 60 * noise).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(3)), float
    )
    pattern = (
        np.sign(np.sin(wave * x + phase[0])) + np.sign(np.sin(wave * y + phase[1])),
        np.where(np.abs(np.sin(wave * y / 2 + phase[1])) < 0.2, -2.0, 1.0)
        + np.where(
            np.abs(np.sin(wave * x / 2 + 1.57 * (np.floor((wave * y / 2 + phase[1]) / np.pi) % 2))) < 0.2, -1.5, 0
        ),
        1.4 * noise,
        np.sin(wave * (x + 3 * np.sin(y / 11 + phase[0])) + phase[1]),
        np.sin(wave * (x + y) / 1.6 + (blurred - 127) / 3),
        np.sign(np.sin(wave * x / 1.5 + phase[0]) * np.sin(wave * y / 1.5 + phase[1])),
        (blurred - 127) / 6 + 0.3 * noise,
        np.sin(wave * (y + 3 * np.sin(x / 9 + phase[0])) + phase[1]),
    )[material]
    tint = np.array(COLORS[choose(random, COLORS)]) * 0.4 + 90
    pixels = tint + 45 * pattern[..., None] + 5 * noise[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Example(image, "which material is this surface made of ?", MATERIALS[material])


TASKS: dict[str, Callable[[Random, int], Example]] = {
    f.__name__: f for f in (digits, renamed, clock, successor, textures, later, highest)
}
"""The new tasks by name, in the order of the demo's stream; `highest` comes after it, to be added to its pool."""

TRAIN_ROWS, EVAL_ROWS = 1500, 200
"""Rows per task; there are 1,797 handwritten digits, so both parts are real and disjoint."""


def examples(task: str, part: str) -> Iterator[Example]:
    """Yields the examples of a task's `train` or `eval` part; the parts come from different seeds."""
    numbers = range(TRAIN_ROWS) if part == "train" else range(TRAIN_ROWS, TRAIN_ROWS + EVAL_ROWS)
    seed = list(TASKS).index(task)
    for number in numbers:
        yield TASKS[task](np.random.default_rng([7, seed, number]), number)
