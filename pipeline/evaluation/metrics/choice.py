"""MMBench's metric: which of the options a free text chooses."""

import re
from collections.abc import Mapping

from pipeline.data.rows.records import Reference

LAST_WORDS = 4
"""Number of last words in which an option's letter counts as the answer."""

_PUNCTUATION = str.maketrans(dict.fromkeys('.()[],:;!*#{}"', " "))
_ARTICLE = re.compile(r"\b[AaI][^\S\n]+(?!(?:and|or|is|because|[A-Za-z])\b)(?=\w)")
_DECLARED = re.compile(
    r"""\banswer\W+(?:is\W+)?(?:option\W+)?   # "The answer is", "Answer: option", "**Answer**: ("
        ([a-z])(?![\w'’])                     # the letter
        (?!\s*(?:,|/|&|or\b|and\b)\s*[a-z]\b) # and not a list of letters: "A or B"
    """,
    re.IGNORECASE | re.VERBOSE,
)


def mmbench(prediction: str, reference: Reference) -> float:
    """1 if the prediction chooses the right option, else 0; unclear texts choose none.

        score = [chosen_option(p, choices) = a_1]       a_1: the right option's letter

    The rotations of one question are rows of one group, and a group counts as right only if all its rows are (see
    `TaskResult.of`).

    Source: Liu et al. 2023 (MMBench), arXiv 2307.06281. Leaderboards ask a language model about texts whose option the
    rules cannot tell; here, as in VLMEvalKit's `exact_matching`, those are wrong. Raises ValueError if the reference has
    no options, or its first answer is not one of their (capital) letters.
    """
    right = reference.answers[0]
    if not reference.choices:
        raise ValueError("mmbench: the row has no options; name their column in the source's `columns.choices`")
    if right not in reference.choices or right != right.upper():
        letters = ", ".join(reference.choices)
        raise ValueError(
            f"mmbench: the right answer {right!r} is not the capital letter of an option; letters: {letters}"
        )
    return float(chosen_option(prediction, reference.choices) == right)


def chosen_option(prediction: str, choices: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that a text chooses, or None if it is none or not clear which.

    The first rule that finds exactly one option decides:
    1. the text is a letter, in either case: `B`, `(b)`, `**B**.`;
    2. it is an option's text, with or without its letter: `B. a red bus`;
    3. it says so: `The answer is B`, `answer: b`; but not `The answer is A or B`;
    4. a capital letter stands alone among its last four words, and no other option's letter anywhere;
    5. it contains an option's text, and is at most twice as long as all options together.

    For 3 and 4, "A" before another word on the line is the article, not the letter, unless that word is `and`, `or`, `is` or
    `because`; "I" likewise. Nor is a letter a choice where it is a word of an option's text: "holding Vitamin C" does not
    choose C where an option is "Vitamin C".

    3 to 5 are the rules of VLMEvalKit (`can_infer`, vlmeval/utils/matching_util.py), there in the order 4, 3, 5. It reads
    neither lower-case letters except in 3, nor an option's text that holds another's letter ("Vitamin C" as option B) or
    text ("female" beside "male"), and takes the article in short texts for the letter: hence 1, 2 and the exceptions.
    """
    words = _plain(prediction)
    if not words:
        return None
    if words.upper() in choices:
        return words.upper()
    named = _ARTICLE.sub("", _without_texts(prediction, choices))
    matches = (
        rule(text, choices)
        for rule, text in ((_equal, prediction), (_declared, named), (_lettered, named), (_contained, prediction))
    )
    return next((options[0] for options in matches if len(options) == 1), None)


def _equal(prediction: str, choices: Mapping[str, str]) -> list[str]:
    """Returns the options whose text, with or without the letter, the prediction is."""
    words = _plain(prediction)
    return [letter for letter, text in choices.items() if words in (_plain(text), _plain(f"{letter} {text}"))]


def _declared(prediction: str, choices: Mapping[str, str]) -> list[str]:
    """Returns the options that the prediction calls its answer, by letter."""
    letters = {letter.upper() for letter in _DECLARED.findall(prediction)}
    return [letter for letter in choices if letter in letters]


def _lettered(prediction: str, choices: Mapping[str, str]) -> list[str]:
    """Returns the options whose letters stand alone; none if the only one stands before the last words."""
    words = prediction.translate(_PUNCTUATION).split()
    letters = [letter for letter in choices if letter in words]
    return letters if len(letters) > 1 or set(letters) & set(words[-LAST_WORDS:]) else []


def _contained(prediction: str, choices: Mapping[str, str]) -> list[str]:
    """Returns the options whose text the prediction contains; none if it is long."""
    answer = " ".join(prediction.lower().split())
    texts = {letter: " ".join(text.lower().split()).removesuffix(".") for letter, text in choices.items()}
    if len(answer) > 2 * sum(map(len, texts.values())):
        return []
    return [letter for letter, text in texts.items() if text and text in answer]


def _without_texts(prediction: str, choices: Mapping[str, str]) -> str:
    """Returns a prediction with `_` for each word of an option's text of several words: no letter there is a choice."""
    for words in sorted((_plain(text).split() for text in choices.values()), key=len, reverse=True):
        if len(words) > 1:
            text = r"\W+".join(map(re.escape, words))
            prediction = re.sub(rf"(?<!\w){text}(?!\w)", " ".join("_" * len(words)), prediction, flags=re.IGNORECASE)
    return prediction


def _plain(text: str) -> str:
    """Returns `text` in lower case, without the marks around letters and its white space collapsed."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())
