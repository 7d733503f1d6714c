"""Metrics that compare texts: each is the best score over the accepted answers."""

import math
import re
import string
from collections import Counter

from rapidfuzz.distance import Levenshtein

from pipeline.data.rows.records import Reference

RELAXED_TOLERANCE = 0.05
"""Largest relative error of a numeric answer in relaxed accuracy (ChartQA)."""

ANLS_THRESHOLD = 0.5
"""Least similarity that earns credit in ANLS (DocVQA)."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, reference: Reference) -> float:
    """1 if the prediction equals an answer, else 0.

        EM = max_a [norm(p) = norm(a)]      norm: lower case, white space collapsed

    Punctuation and articles count, as in the scorers of GQA, OCR-VQA and other benchmarks of short answers; SQuAD's own
    exact match (Rajpurkar et al. 2016, arXiv 1606.05250) removes both.
    """
    predicted = _collapse(prediction)
    return max(float(predicted == _collapse(answer)) for answer in reference.answers)


def token_f1(prediction: str, reference: Reference) -> float:
    """F1 of the words that prediction and answer share, best over the answers.

        c  = words in common, each as often as in both
        P  = c / #words(p),  R = c / #words(a),  F1 = max_a 2 P R / (P + R) = max_a 2 c / (#words(p) + #words(a))

    Words: lower case, ASCII punctuation deleted ("1,200" is "1200"), then "a", "an", "the" deleted, then split at white
    space. Where no word is left of prediction or answer, F1 is 1 if none is left of both, else 0.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, and the evaluation script of SQuAD 2.0 (arXiv 1806.03822); that of
    SQuAD 1.1 gives 0 for two empty texts and agrees otherwise.
    """

    def score(answer: str) -> float:
        predicted, expected = _words(prediction), _words(answer)
        if not predicted or not expected:
            return float(predicted == expected)
        common = (Counter(predicted) & Counter(expected)).total()
        return 2 * common / (len(predicted) + len(expected))

    return max(score(answer) for answer in reference.answers)


def relaxed_accuracy(prediction: str, reference: Reference) -> float:
    """1 if a numeric answer is met within 5 %, or any other answer exactly, else 0.

        RA = max_a [|p - a| / |a| <= 0.05]      if p and a are numbers and a is not 0
                   [lower(p) = lower(a)]        otherwise

    A number is what Python's `float` reads and is finite; "12%" is 0.12, so it meets 0.12 and not 12. Not numbers, hence
    compared as texts: "1,200", "$5", "5 apples". With a = 0 the texts must agree ("0.0" does not meet "0"). Years are
    numbers: 2008 meets 2010.

    Source: Masry et al. 2022 (ChartQA), arXiv 2203.10244, section 5.1, after Methani et al. 2020 (PlotQA), arXiv
    1909.00997. The paper leaves numbers undefined; this is `relaxed_correctness` of pix2struct, which VLMEvalKit,
    lmms-eval, Qwen-VL and InternVL share and their published numbers use. mistral-evals (Pixtral, Llama 3.2) is more
    lenient: it deletes "," and "$", lets 12 meet 12%, and drops final punctuation. ChartQAPro compares years exactly and
    texts by ANLS.
    """

    def score(answer: str) -> float:
        predicted, expected = _number(prediction), _number(answer)
        if predicted is None or not expected:
            return float(prediction.strip().lower() == answer.strip().lower())
        return float(abs(predicted - expected) / abs(expected) <= RELAXED_TOLERANCE)

    return max(score(answer) for answer in reference.answers)


def anls(prediction: str, reference: Reference) -> float:
    """Average normalised Levenshtein similarity, of one prediction.

        NL(p, a) = levenshtein(norm(p), norm(a)) / max(|p|, |a|)        in characters; 0 for two empty texts
        ANLS     = max_a s,   s = 1 - NL if 1 - NL >= 0.5, else 0       norm: lower case, white space collapsed

    The lengths |p| and |a| are those of the texts as they stand, all white space counted.

    Source: Biten et al. 2019, arXiv 1905.13648; used by DocVQA, arXiv 2007.00398. The paper asks for NL < 0.5 and says
    nothing of white space; the benchmark's own scorer, followed here as by VLMEvalKit and lmms-eval, also credits NL = 0.5,
    collapses white space before it compares, and divides by the length before that.
    """
    predicted = _collapse(prediction)

    def similarity(answer: str) -> float:
        length = max(len(prediction.upper()), len(answer.upper()))  # "ß" counts as two, as in the benchmark's scorer
        return 1 - Levenshtein.distance(predicted, _collapse(answer)) / length if length else 1.0

    best = max(map(similarity, reference.answers))
    return best if best >= ANLS_THRESHOLD else 0.0


def _collapse(text: str) -> str:
    """Returns `text` in lower case with its white space collapsed."""
    return " ".join(text.lower().split())


def _words(text: str) -> list[str]:
    """Returns the words of `text` as SQuAD counts them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _number(text: str) -> float | None:
    """Returns the finite number that `text` spells, or None."""
    digits = text.strip()
    try:
        value = float(digits.rstrip("%"))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if digits.endswith("%") else value
