"""Variants of the demo's tasks: the same task under other circumstances, to learn from or to be evaluated on.

`<task>+<variant>` names one of them. Of training parts: `many` (4,096 rows), `noisy10` and `noisy30` (so many percent of the
answers are wrong). Of evaluation parts: `reworded` (questions in words that training never saw), `shifted` (a colour cast, less
contrast, more noise), `twopictures` (another picture comes first, to which the question cannot belong), `twoturns` (another
question and its answer come first).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.demo import abilities, tasks
from pipeline.data.demo.abilities import Example
from pipeline.data.demo.drawing import COLORS, Random, choose


class Dialogue(NamedTuple):
    """Several turns, or several pictures."""

    images: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]
    """Question and answer of each; `<image>` stands for a picture."""


REWORDED: dict[str, tuple[str, ...]] = {
    "digits": ("what digit was written by hand ?", "read the digit that a hand wrote ."),
    "renamed": ("tell the new name of the object .", "which new name has this thing ?"),
    "clock": ("what time is it on the clock ?", "tell the hour of the clock ."),
    "successor": ("say the next number for {} .", "what is the next number for {} ?"),
    "textures": ("what is the material of the surface ?", "name the material that you see ."),
    "later": ("what time is it in three hours ?", "tell the hour three hours from now ."),
    "highest": ("say the highest number of {} .", "what is the highest number of {} ?"),
}
"""Other words for each task's question; `{}` stands for the digits of a text-only task."""
TEXT_ONLY = ("successor", "highest")
MANY_ROWS = 4096
"""Rows of `many`, for tasks whose pictures can be drawn without end."""
MANY = ("renamed", "clock", "textures", "later")
NOISE = {"noisy10": 0.1, "noisy30": 0.3}
PARTS = {
    **dict.fromkeys(("many", *NOISE), ("train",)),
    **dict.fromkeys(("reworded", "shifted", "twopictures", "twoturns"), ("eval",)),
}
"""The parts of each variant."""
ILLUSTRATED = tuple(task for task in tasks.TASKS if task not in TEXT_ONLY)


def variants(part: str) -> list[str]:
    """Returns the names `<task>+<variant>` of which there is this part."""
    only = {"many": MANY, "shifted": ILLUSTRATED, "twopictures": ILLUSTRATED}
    return [
        f"{task}+{variant}"
        for variant, parts in PARTS.items()
        if part in parts
        for task in only.get(variant, tuple(tasks.TASKS))
    ]


def examples(name: str, part: str) -> Iterator[Example | Dialogue]:
    """Yields the examples of a variant's `train` or `eval` part."""
    task, _, variant = name.partition("+")
    if variant == "many":
        draw, seed = tasks.TASKS[task], list(tasks.TASKS).index(task)
        yield from (draw(np.random.default_rng([71, seed, number]), number) for number in range(MANY_ROWS))
        return
    originals = list(tasks.examples(task, part))
    answers = sorted({example.answer for example in originals})
    for number, example in enumerate(originals):
        random = np.random.default_rng([73, list(tasks.TASKS).index(task), list(PARTS).index(variant), number])
        yield _varied(task, variant, example, answers, random)


def strangers() -> Iterator[Example]:
    """Yields prompts of no task and of no ability that the base has: it alone should answer them."""
    for number in range(tasks.EVAL_ROWS):
        ability = (abilities.exists, abilities.chart_value)[number % 2]
        yield ability(np.random.default_rng([79, number]))


def _varied(task: str, variant: str, example: Example, answers: list[str], random: Random) -> Example | Dialogue:
    if variant in NOISE:
        wrong = random.random() < NOISE[variant]
        return (
            example._replace(answer=choose(random, [a for a in answers if a != example.answer])) if wrong else example
        )
    if variant == "reworded":
        return example._replace(question=choose(random, REWORDED[task]).format(_digits(example.question)))
    if variant == "twoturns":
        first, image = abilities.repeat(random), example.image
        turns = ((first.question, first.answer), (example.prompt, example.answer))
        return Dialogue(() if image is None else (image,), turns)
    assert example.image is not None, "of tasks with pictures alone"
    if variant == "twopictures":
        other = abilities.chart_rank(random).image
        assert other is not None
        return Dialogue((other, example.image), ((f"<image><image>{example.question}", example.answer),))
    return example._replace(image=_shifted(random, example.image))


def _digits(question: str) -> str:
    return " ".join(word for word in question.split() if word in abilities.DIGITS)


def _shifted(random: Random, image: Image.Image) -> Image.Image:
    """Returns a picture with a colour cast, three quarters of the contrast, and more noise."""
    cast = np.array(COLORS[choose(random, COLORS)], float)
    pixels = 0.75 * np.asarray(image, float) + 0.25 * cast + random.normal(0, 14, (*image.size[::-1], 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
