"""Seeded drawing of shapes, bars, printed text, lines and textures on a 64x64 canvas."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
"""Side of the canvas, in pixels."""

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "bar")

Random = np.random.Generator
RGB = tuple[int, int, int]
T = TypeVar("T")


def choose(random: Random, options: Iterable[T]) -> T:
    """Returns one of `options`."""
    options = list(options)
    return options[random.integers(len(options))]


def sample(random: Random, options: Iterable[T], count: int) -> list[T]:
    """Returns `count` different ones of `options`, in random order."""
    options = list(options)
    return [options[i] for i in random.permutation(len(options))[:count]]


def canvas(random: Random, *, paper: bool = False) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Returns an empty image and its pen; paper is nearly white, otherwise dark or light grey."""
    level = int(random.integers(225, 256)) if paper or random.random() < 0.5 else int(random.integers(0, 40))
    image = Image.new("RGB", (SIDE, SIDE), (level, level, level))
    return image, ImageDraw.Draw(image)


def ink(random: Random, image: Image.Image) -> RGB:
    """Returns a grey that contrasts with the image's top left corner."""
    light = np.asarray(image)[0, 0, 0] > 127
    level = int(random.integers(0, 70)) if light else int(random.integers(190, 256))
    return level, level, level


def shade(random: Random, color: str) -> RGB:
    """Returns the named colour, varied a little in each channel."""
    red, green, blue = (int(np.clip(c + random.integers(-18, 19), 0, 255)) for c in COLORS[color])
    return red, green, blue


def speckle(random: Random, image: Image.Image, strength: float = 6.0) -> Image.Image:
    """Adds Gaussian pixel noise of `strength` grey levels."""
    pixels = np.asarray(image, dtype=np.float32) + random.normal(0, strength, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: RGB) -> None:
    """Draws `shape` of radius `r` pixels centred on (x, y)."""
    box = [x - r, y - r, x + r, y + r]
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle([x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r], fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=fill)
    elif shape == "cross":
        w = 0.33 * r
        pen.rectangle([x - w, y - r, x + w, y + r], fill=fill)
        pen.rectangle([x - r, y - w, x + r, y + w], fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, round(0.35 * r)))
    elif shape == "bar":
        pen.rectangle([x - r, y - 0.3 * r, x + r, y + 0.3 * r], fill=fill)
    elif shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        pen.polygon([(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles, strict=True)], fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the typeface that comes with Pillow, `size` pixels high."""
    return ImageFont.load_default(size=size)


class Print(NamedTuple):
    """One printed word."""

    word: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels."""


def print_symbols(random: Random, symbols: Sequence[str]) -> tuple[Image.Image, list[Print]]:
    """Prints up to four symbols in one line, in varied size, weight and place, on paper; also says where they are."""
    image, pen = canvas(random, paper=True)
    tone, size, weight = ink(random, image), int(random.integers(15, 23)), int(random.integers(2)) / 2
    y, width = random.uniform(12, 52), random.uniform(14 * len(symbols), 64)
    left, prints = random.uniform(0, 64 - width), []
    for i, symbol in enumerate(symbols):
        place = (left + width * (i + 0.5) / len(symbols) + random.uniform(-1, 1), y + random.uniform(-2, 2))
        prints.append(print_word(pen, place, symbol, size, tone, anchor="mm", weight=weight))
    return speckle(random, image, 3), prints


def print_word(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    word: str,
    size: int,
    tone: RGB,
    anchor: str,
    weight: float = 0,
) -> Print:
    """Prints one word in capitals, `size` pixels high, and says where it is."""
    style: dict[str, Any] = {"font": font(size), "anchor": anchor, "stroke_width": weight}
    pen.text(place, word.upper(), fill=tone, **style)
    return Print(word, pen.textbbox(place, word.upper(), **style))


def polar_point(x: float, y: float, degrees: float, length: float) -> tuple[float, float]:
    """Returns the point `length` pixels from (x, y); 0 degrees points up and angles run clockwise, as on a clock."""
    return x + length * math.sin(math.radians(degrees)), y - length * math.cos(math.radians(degrees))
