"""The confusable streams: every question has one right answer, none is learned that is asked, and each confuses as it says."""

import hashlib

import pytest

from pipeline.data.demo.abilities import vocabulary
from pipeline.data.demo.confusable import (
    GROUP,
    KINDS,
    MOST,
    PHRASINGS,
    QUESTIONS,
    REPORTED,
    TUNED,
    _phrasings,
    confusable,
    examples,
    mixed,
)
from pipeline.data.demo.files import demo_part

NUMBERS = (0, 1, 2, 5, 33)


def content(example) -> tuple[str, str]:
    picture = b"" if example.image is None else example.image.tobytes()
    return example.question, hashlib.sha256(picture).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", NUMBERS)
def test_words_are_known_and_examples_always_the_same(kind, number):
    words = {*vocabulary(), ":", "?", "."}
    drawn = list(examples(kind, number, 30, held_out=False))
    assert all({*e.question.split(), *e.answer.split()} <= words for e in drawn)
    assert list(map(content, drawn)) == list(map(content, examples(kind, number, 30, held_out=False)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_evaluated_is_never_learned(kind, number):
    learned = {content(e) for e in examples(kind, number, 300, held_out=False)}
    assert not learned & {content(e) for e in examples(kind, number, 40, held_out=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_has_one_right_answer(kind):
    for number in range(MOST):
        task = confusable(kind, number)
        assert len(set(task.meaning.values())) == len(task.meaning) == 6, "no two things have the same name"
    answers: dict[tuple[str, str], set[str]] = {}
    for number in NUMBERS:
        for e in examples(kind, number, 100, held_out=False):
            answers.setdefault(content(e), set()).add(e.answer)
    assert all(len(of) == 1 for of in answers.values())


def test_no_two_tasks_mean_the_same():
    for kind in KINDS:
        meanings = [tuple(sorted(confusable(kind, number).meaning.items())) for number in range(MOST)]
        assert len(set(meanings)) == MOST


def test_domain_asks_as_the_base_does_about_other_pictures():
    for number in range(MOST):
        task = confusable("domain", number)
        assert tuple(task.questions) == QUESTIONS[task.attribute]
        assert task.background is not None
    assert len({confusable("domain", number).background for number in range(40)}) == 40


def test_pictures_are_the_bases_and_questions_are_not():
    asked = [confusable("pictures", number).questions for number in range(MOST)]
    assert len(set(asked)) == MOST
    assert not {q for (q,) in asked} & {q for of in QUESTIONS.values() for q in of}
    assert all(confusable("pictures", number).background is None for number in range(MOST))


def test_paraphrases_share_words_and_no_phrasing():
    phrasings = [phrasing for number in range(MOST) for phrasing in confusable("paraphrase", number).questions]
    assert len(phrasings) == len(set(phrasings)) == PHRASINGS * MOST <= len(_phrasings())
    words = [set(" ".join(confusable("paraphrase", number).questions).split()) for number in range(MOST)]
    assert all(any(len(one & other) >= len(one) / 2 for other in words if other is not one) for one in words)


def test_order_has_the_same_words_in_other_orders():
    for group in range(0, MOST, GROUP):
        asked = [confusable("order", number).questions[0].split() for number in range(group, group + GROUP)]
        assert len({tuple(words) for words in asked}) == GROUP
        assert len({tuple(sorted(words)) for words in asked}) == 1
    illustrated = [next(examples("order", number, 1, held_out=True)).image is not None for number in range(2 * GROUP)]
    assert illustrated == [True] * GROUP + [False] * GROUP


def test_streams_are_mixed_in_turn_and_one_is_for_tuning():
    assert mixed(6) == ["domain_000", "pictures_000", "paraphrase_000", "order_000", "domain_001", "pictures_001"]
    assert len(set(mixed(100))) == 100
    assert {TUNED, *REPORTED} == set(KINDS)
    assert len(REPORTED) == 3
    assert demo_part("demo://order_099/train") == ("order_099", "train")
    with pytest.raises(ValueError, match="confusable ones domain_000/train"):
        demo_part("demo://order_100/train")
