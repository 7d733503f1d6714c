from itertools import islice, product

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data.demo.abilities import DIGITS, LETTERS, vocabulary
from pipeline.data.demo.files import OPERATION_ROWS, demo_file, demo_part
from pipeline.data.demo.operations import (
    LONGEST,
    MODALITIES,
    NEW_OPERATIONS,
    NOTHING,
    OPERATIONS,
    PLACES,
    draw_symbols,
    examples,
    held_out,
    spread,
    twins,
)
from pipeline.data.errors import StreamError

ALL = OPERATIONS | NEW_OPERATIONS
ANSWERS = {  # of "3 9 0 3"
    "repeat": "3 9 0 3", "reverse": "3 0 9 3", "sort": "0 3 3 9", "sort_down": "9 3 3 0", "count": "4", "largest": "9",
    "smallest": "0", "first": "3", "last": "3", "ends": "3 3", "twice": "3 9 0 3 3 9 0 3",
    "in_words": "three nine zero three", "next": "4 0 1 4", "below": "2 8 9 2", "without_first": "9 0 3",
    "rotate": "9 0 3 3", "second_largest": "3", "only_odd": "3 9 3",
}  # fmt: skip


def printed_in(example) -> str:
    return " ".join(p.word for p in example.prints)


@pytest.mark.parametrize("name", ALL)
def test_answers_are_right(name):
    assert " ".join(ALL[name].answer("3903")) == ANSWERS[name]


def test_letters_are_sorted_by_the_alphabet():
    assert list(OPERATIONS["sort"].answer("zab")) == ["a", "b", "z"]
    assert list(LETTERS) == sorted(LETTERS)


def test_no_odd_number_is_an_answer_too():
    assert NEW_OPERATIONS["only_odd"].answer("28") == ["no"]


@pytest.mark.parametrize("name", ALL)
def test_a_picture_is_asked_about_as_its_written_twin(name):
    written, printed = (list(examples(name, m, 30, evaluation=True)) for m in MODALITIES)
    for text, picture in zip(written, printed, strict=True):
        assert text.image is None
        assert picture.image is not None
        place = "<image>" if "<image>" in picture.question else "this"
        assert picture.question.replace(place, printed_in(picture)) == text.question
        assert picture.answer == text.answer
        assert picture.prompt.count("<image>") == 1


@pytest.mark.parametrize("name", ALL)
def test_no_sequence_is_in_both_parts(name):
    sequences = [{printed_in(e) for e in examples(name, "picture", 200, evaluation=part)} for part in (False, True)]
    assert not sequences[0] & sequences[1]
    assert len(sequences[1]) > 20


def test_pretraining_sees_no_sequence_that_is_held_out():
    random = np.random.default_rng(0)
    drawn = [draw_symbols(random, operation) for operation in OPERATIONS.values() for _ in range(50)]
    assert not any(held_out(symbols) for symbols in drawn)
    assert {len(symbols) for symbols in drawn} == set(range(1, LONGEST + 1))


def test_every_fifth_sequence_is_held_out():
    share = np.mean([held_out(symbols) for symbols in product(DIGITS, repeat=3)])
    assert share == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("modality", MODALITIES)
def test_examples_are_the_same_everywhere(modality):
    first, second = (list(examples("sort", modality, 5, evaluation=False)) for _ in range(2))
    assert [e.question for e in first] == [e.question for e in second]
    if modality == "picture":
        assert [e.image.tobytes() for e in first] == [e.image.tobytes() for e in second]
    more = list(islice(examples("sort", modality, 500, evaluation=False), 5))
    assert [e.answer for e in more] == [e.answer for e in first]


def test_one_picture_serves_several_questions():
    pairs = list(twins(np.random.default_rng(3), list(OPERATIONS.values()), ["4", "2"]))
    assert len({id(picture.image) for _, picture in pairs}) == 1


def test_sequences_are_spread_out_as_print_is_over_image_tokens():
    random = np.random.default_rng(0)
    written = [spread(random, ["4", "2", "4"]).split() for _ in range(300)]
    assert all([c for c in text if c != NOTHING] == ["4", "2", "4"] for text in written)
    assert {len(text) for text in written} == {PLACES}
    assert {text.index("4") for text in written} == set(range(PLACES - 2))
    pairs = twins(random, [OPERATIONS["sort"]] * 200, ["4", "2"], spread_out=0.5)
    assert 60 < sum(NOTHING in text.question for text, _ in pairs) < 140
    plain, apart = (list(examples("next", "text", 20, evaluation=False, spread_out=share)) for share in (0.0, 1.0))
    assert [e.answer for e in plain] == [e.answer for e in apart]
    assert not any(NOTHING in e.question for e in plain)
    assert all(e.question.count(NOTHING) == PLACES - len(e.answer.split()) for e in apart)


def test_operations_that_share_a_sequence_share_its_alphabet():
    operations = [OPERATIONS["repeat"], OPERATIONS["in_words"]]
    random = np.random.default_rng(0)
    assert all(set(draw_symbols(random, *operations)) <= set(DIGITS) for _ in range(20))


def test_pretraining_has_words_of_the_vocabulary():
    words = set(vocabulary())
    for name in OPERATIONS:
        for example in examples(name, "text", 50, evaluation=False):
            assert set(f"{example.question} {example.answer}".split()) <= words | {"?", ":"}


def test_new_operations_are_tasks_in_either_modality(tmp_path):
    for part, rows in OPERATION_ROWS.items():
        written, printed = (
            pq.read_table(demo_file(f"demo://rotate_{modality}/{part}", tmp_path)).to_pylist()
            for modality in MODALITIES
        )
        assert len(written) == len(printed) == rows
        assert [row["messages"][1] for row in written] == [row["messages"][1] for row in printed]
        assert {len(row["images"]) for row in written} | {len(row["images"]) + 1 for row in printed} == {0, 2}
        spread_out = sum(f"{NOTHING} {NOTHING}" in row["messages"][0]["content"] for row in written)
        assert (spread_out > 0.3 * rows) == (part == "train")
    with pytest.raises(StreamError, match="demo://reverse_text/train: no such demo data"):
        demo_part("demo://reverse_text/train")
