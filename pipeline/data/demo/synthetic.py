"""Up to 2,000 cheap synthetic tasks, all different, for experiments with large pools.

Task number k has its own call (two words without meaning here) and its own secret dictionary. Four of five tasks are text
only: the answer to two words is their translations. Every fifth task shows a shape and asks for its translation. Training
never shows the pairs of the evaluation. From number 1,000 on, calls are those of the first thousand with their two words
swapped.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations

import numpy as np

from pipeline.data.demo.abilities import Example
from pipeline.data.demo.drawing import COLORS, SHAPES, canvas, choose, draw_shape, sample, shade, speckle

CALLS = (
    "again below bottom called center clock copy day direction draw entry fabric find first form hands high hour large "
    "last later letter line look low material middle minute name next number object place point printed question "
    "reverse right same shape short size small strokes surface text texture time top value word"
)
"""Words of the calls; the base's vocabulary has all of them."""
NOUNS = "dog cat sun moon tree house car fish bird book milk bread apple river king queen snow rain fire ice"
"""Words of the dictionaries."""
MEANINGS = 6
"""Words in a dictionary; pairs of them make questions."""
DIFFERENT = 1000
"""Tasks whose calls differ in their words."""
HELD_OUT = 9
"""Pairs of a dictionary's 36 that are kept for evaluation."""


@cache
def _calls() -> list[str]:
    """Returns the calls of all tasks: every two words once, in a fixed random order, then the other way round."""
    pairs = list(combinations(CALLS.split(), 2))
    chosen = [pairs[i] for i in np.random.default_rng(29).permutation(len(pairs))[:DIFFERENT]]
    return [f"{a} {b}" for a, b in chosen] + [f"{b} {a}" for a, b in chosen]


def examples(number: int, count: int, *, held_out: bool) -> Iterator[Example]:
    """Yields `count` examples of task `number` (below 2,000), for training or `held_out` for evaluation."""
    secret = np.random.default_rng([31, number])
    illustrated = number % 5 == 4
    words = list(SHAPES)[:MEANINGS] if illustrated else sample(secret, NOUNS.split(), MEANINGS)
    meaning = dict(zip(words, sample(secret, NOUNS.split(), MEANINGS), strict=True))
    pairs = [(a, b) for a in words for b in words]
    order = secret.permutation(len(pairs))
    kept = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    random = np.random.default_rng([37, number, held_out])
    for _ in range(count):
        if illustrated:
            image, pen = canvas(random)
            word, r = choose(random, words), random.uniform(9, 20)
            x, y = random.uniform(r + 1, 63 - r, size=2)
            draw_shape(pen, word, x, y, r, shade(random, choose(random, COLORS)))
            yield Example(speckle(random, image), f"{_calls()[number]} ?", meaning[word])
        else:
            first, second = pairs[random.choice(kept)]
            question = f"{_calls()[number]} : {first} {second}"
            yield Example(None, question, f"{meaning[first]} {meaning[second]}")
