"""Variants of the demo's tasks: what is varied, and that the right answer stays the right one."""

import hashlib
import re
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.data.demo import tasks
from pipeline.data.demo.abilities import vocabulary
from pipeline.data.demo.files import demo_file, demo_part
from pipeline.data.demo.variants import MANY_ROWS, NOISE, Dialogue, examples, strangers, variants


def test_each_part_of_a_variant_is_found_and_no_other():
    for part in ("train", "eval"):
        assert all(demo_part(f"demo://{name}/{part}") == (name, part) for name in variants(part))
    for path in ("demo://digits+many/train", "demo://renamed+reworded/train", "demo://renamed+noisy10/eval"):
        with pytest.raises(ValueError, match="no such demo data"):
            demo_part(path)


@pytest.mark.parametrize("name", variants("eval"))
def test_the_right_answer_stays(name):
    task = name.partition("+")[0]
    for varied, original in zip(islice(examples(name, "eval"), 40), tasks.examples(task, "eval"), strict=False):
        turns = varied.turns if isinstance(varied, Dialogue) else ((varied.question, varied.answer),)
        assert turns[-1][1] == original.answer
        words = {*vocabulary(), ":", "?", ".", "<image>"}
        assert {
            word for turn in turns for text in turn for word in re.sub("<image>", "<image> ", text).split()
        } <= words


@pytest.mark.parametrize(("noise", "share"), NOISE.items())
def test_so_many_answers_are_wrong(noise, share):
    pairs = list(zip(examples(f"renamed+{noise}", "train"), tasks.examples("renamed", "train"), strict=True))
    assert np.mean([noisy.answer != right.answer for noisy, right in pairs]) == pytest.approx(share, abs=0.03)
    assert all(noisy.question == right.question for noisy, right in pairs)


def test_reworded_questions_are_never_learned():
    for name in (name for name in variants("eval") if name.endswith("+reworded")):
        learned = {e.question for e in islice(tasks.examples(name.partition("+")[0], "train"), 300)}
        assert not learned & {e.question for e in examples(name, "eval")}


def test_many_rows_are_other_rows_than_those_of_the_evaluation():
    asked = {hashlib.sha256(e.image.tobytes()).hexdigest() for e in tasks.examples("renamed", "eval")}
    drawn = {hashlib.sha256(e.image.tobytes()).hexdigest() for e in examples("renamed+many", "train")}
    assert len(drawn) == MANY_ROWS
    assert not drawn & asked


def test_several_pictures_and_turns_are_written_as_such(tmp_path):
    two = pq.read_table(demo_file("demo://clock+twopictures/eval", tmp_path)).to_pylist()[0]
    assert (len(two["images"]), two["messages"][0]["content"].count("<image>")) == (2, 2)
    turns = pq.read_table(demo_file("demo://clock+twoturns/eval", tmp_path)).to_pylist()[0]
    assert [m["role"] for m in turns["messages"]] == ["user", "assistant"] * 2
    assert ["<image>" in m["content"] for m in turns["messages"]] == [False, False, True, False]


def test_strangers_are_of_abilities_that_the_base_has_not():
    questions = [e.question for e in strangers()]
    assert len(questions) == tasks.EVAL_ROWS
    assert sum("is there" in q or "do you see" in q for q in questions) == tasks.EVAL_ROWS // 2
