from itertools import islice

import pytest

from pipeline.data.demo.abilities import vocabulary
from pipeline.data.demo.synthetic import examples


@pytest.mark.parametrize("number", [0, 4, 57])
def test_words_are_known_and_examples_always_the_same(number):
    words = {*vocabulary(), ":", "?"}
    one = list(examples(number, 20, held_out=False))
    assert all({*e.question.split(), *e.answer.split()} <= words for e in one)
    assert [(e.question, e.answer) for e in one] == [
        (e.question, e.answer) for e in islice(examples(number, 40, held_out=False), 20)
    ]
    assert all((e.image is not None) == (number % 5 == 4) for e in one)


def test_no_question_of_the_evaluation_is_learned():
    learned = {e.question for e in examples(0, 2000, held_out=False)}
    evaluated = {e.question for e in examples(0, 500, held_out=True)}
    assert (len(learned), len(evaluated)) == (27, 9)
    assert not learned & evaluated


def test_a_dictionary_is_a_function_of_the_word():
    meaning: dict[str, set[str]] = {}
    for e in (*examples(3, 300, held_out=False), *examples(3, 100, held_out=True)):
        for word, translation in zip(e.question.split()[-2:], e.answer.split(), strict=True):
            meaning.setdefault(word, set()).add(translation)
    assert len(meaning) == 6
    assert all(len(translations) == 1 for translations in meaning.values())


def test_every_task_has_a_call_of_its_own():
    calls = [frozenset(next(examples(n, 1, held_out=False)).question.split()[:2]) for n in range(1000)]
    assert len(set(calls)) == 1000


def test_swapped_calls_have_dictionaries_of_their_own():
    one, other = (list(examples(n, 50, held_out=False)) for n in (3, 1003))
    assert one[0].question.split()[:2] == other[0].question.split()[1::-1]
    assert {e.answer for e in one} != {e.answer for e in other}
