"""How one answer is scored: exact match, relaxed accuracy (charts), ANLS (documents).

- Each metric takes the predicted text and the accepted answers, and returns the best score over the answers, in [0, 1].
- All normalise alike: lower case, surrounding white space removed, inner white space collapsed to single spaces.
  Punctuation and articles are kept.
- Knows nothing of tasks or models.
"""

import math
from collections.abc import Callable, Sequence

RELAXED_TOLERANCE = 0.05
"""Largest relative error of a numeric answer in relaxed accuracy (ChartQA)."""

ANLS_THRESHOLD = 0.5
"""Least similarity that earns credit in ANLS (DocVQA)."""


def normalise(text: str) -> str:
    """Returns `text` in lower case with its white space collapsed."""
    return " ".join(text.lower().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised answer, else 0.

        EM = max_a [norm(p) = norm(a)]

    Source: Rajpurkar et al. 2016, arXiv 1606.05250 (without its removal of punctuation and articles).
    """
    predicted = normalise(prediction)
    return _best(answers, lambda answer: float(predicted == normalise(answer)))


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if a numeric answer is met within 5 %, or any other answer exactly, else 0.

        RA = max_a [|p - a| <= 0.05 |a|]   if p and a are both finite numbers ("12 %" is 0.12, "1,200" is 1200)
                   [norm(p) = norm(a)]     otherwise

    Source: Masry et al. 2022 (ChartQA), arXiv 2203.10244, after Methani et al. 2020 (PlotQA), arXiv 1909.00997.
    """

    def score(answer: str) -> float:
        predicted, expected = _number(prediction), _number(answer)
        if predicted is None or expected is None:
            return exact_match(prediction, [answer])
        return float(abs(predicted - expected) <= RELAXED_TOLERANCE * abs(expected))

    return _best(answers, score)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one prediction.

        NL(p, a) = levenshtein(p, a) / max(|p|, |a|)        of the normalised texts, in characters
        ANLS     = max_a s,   s = 1 - NL if 1 - NL >= 0.5, else 0

    Source: Biten et al. 2019, arXiv 1905.13648; used by DocVQA, arXiv 2007.00398. The paper asks for NL < 0.5; the
    benchmark's own scorer, followed here, also credits NL = 0.5.
    """
    predicted = normalise(prediction)

    def score(answer: str) -> float:
        expected = normalise(answer)
        longest = max(len(predicted), len(expected))
        similarity = 1.0 - _levenshtein(predicted, expected) / longest if longest else 1.0
        return similarity if similarity >= ANLS_THRESHOLD else 0.0

    return _best(answers, score)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}
"""The metrics by the names that a task's `metric` field takes."""


def _best(answers: Sequence[str], score: Callable[[str], float]) -> float:
    """Returns the best score over the accepted answers; refuses a lone string, which would be read letter by letter."""
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers: a prompt needs a list of at least one accepted answer, found {answers!r}")
    return max(score(answer) for answer in answers)


def _number(text: str) -> float | None:
    """Returns the finite number that `text` spells, or None."""
    digits = text.strip().replace(",", "")
    percent = digits.endswith("%")
    try:
        value = float(digits.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100.0 if percent else value


def _levenshtein(first: str, second: str) -> int:
    """Returns the least number of insertions, deletions and substitutions; one row of the table at a time."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]
