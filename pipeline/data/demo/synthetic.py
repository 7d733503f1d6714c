"""Any number of cheap tasks, all different: for questions about large pools.

Task number k has a call of its own (two words that mean nothing here) and a secret dictionary of its own. Four of five are
text only, and answer two words by their translations; every fifth shows a shape and wants its translation. Training never
shows the pairs that are asked later. From number 1,000 on, calls are those of the first thousand with their words swapped:
the same words in another order.
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
"""What calls are made of: words that the base can read."""
NOUNS = "dog cat sun moon tree house car fish bird book milk bread apple river king queen snow rain fire ice"
"""What dictionaries are made of."""
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
    """Yields `count` examples of task `number` (below 2,000), to learn from or kept for evaluation."""
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
