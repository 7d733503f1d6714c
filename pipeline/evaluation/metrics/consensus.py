"""VQA accuracy: agreement of an answer with those of ten people."""

import re

from pipeline.data.rows.records import Reference

AGREEING = 3
"""People who must have given an answer for it to be right."""

_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")

_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_SPELLED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
}
"""Contractions by the spellings that lack one of their apostrophes."""


def vqa_accuracy(prediction: str, reference: Reference) -> float:
    """Agreement with people's answers a_1 .. a_n, one answer a person (n = 10 in VQA, OK-VQA, TextVQA, VizWiz).

        accuracy = 1/n · Σ_i min(#{j ≠ i : norm(a_j) = norm(p)} / 3, 1)

    The average over all ways to leave one person out makes people's own answers comparable. With n = 10 an answer that
    1, 2, 3, 4 people gave scores 0.3, 0.6, 0.9, 1. With 4 to 9 answers the same formula holds, and an answer that four
    gave still scores 1. With fewer than four nothing could score 1, not even what all said: ValueError.

    norm, in this order, is the evaluation's of VQA:
    1. the characters ; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? ! become a space; each is deleted instead where it stands
       beside a space anywhere in the text, and all are where a comma stands between digits ("1,200" is "1200");
    2. periods are deleted unless a digit follows;
    3. lower case; "none", "zero" .. "ten" become digits; "a", "an", "the" go;
    4. contractions that lack one apostrophe get it back ("dont" is "don't").

    Source: Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017 (VQA v2), arXiv 1612.00837; the evaluation code at
    github.com/GT-Vision-Lab/VQA. That code normalises prediction and answers only where people's answers differ (its first
    versions: answers by 1 and 2 alone); where all agree, it compares texts as they stand, so that "Two" is not their "2".
    Here all steps apply to both sides always, as in VLMEvalKit. TextVQA's scorer (MMF, LLaVA, InternVL) does so too, but
    first splits off "'s" and deletes commas and question marks.
    """
    if len(reference.answers) <= AGREEING:
        raise ValueError(
            f"vqa_accuracy needs the answers of ten people (at least {AGREEING + 1}), found {len(reference.answers)}; "
            "let the task's answer column hold the list of all answers, or choose `metric: exact_match`"
        )
    agree = sum(_normalise(answer) == _normalise(prediction) for answer in reference.answers)
    others = len(reference.answers) - agree
    return (agree * min((agree - 1) / AGREEING, 1) + others * min(agree / AGREEING, 1)) / len(reference.answers)


def _normalise(text: str) -> str:
    """Returns `text` as VQA compares answers; see `vqa_accuracy`."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = _THOUSANDS.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if thousands or beside_space else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)
