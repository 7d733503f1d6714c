"""MMBench's layout: prompt, rotations, shared images."""

import pytest

from pipeline.data.errors import UnreadableRow
from pipeline.data.sources.mmbench import INSTRUCTION, questions

IMAGE = "A" * 100
"""What is longer than an index: an image."""


def row(index, *options: str | None, answer="A", image=IMAGE, **more) -> dict:
    cells = dict(zip("ABCD", [*options, *[None] * 4], strict=False))
    return {"index": index, "question": "which ?", "answer": answer, "image": image} | cells | more


def turns_of(rows: list, limit: int | None = None) -> list:
    numbered = [("a.tsv", number, entry) for number, entry in enumerate(rows, start=1)]
    return [turn for _, _, turn in questions(lambda: iter(numbered), limit)]


def letters(turns: list) -> list[tuple[str, str]]:
    return [(turn["answer"], turn["choices"][turn["answer"]]) for turn in turns]


def reason(rows: list) -> str:
    (unreadable,) = [turn for turn in turns_of(rows) if isinstance(turn, UnreadableRow)]
    return unreadable.reason


def test_the_prompt_as_published():
    (first, _) = turns_of([row(7, "red", "blue", hint="look")])
    assert first["question"] == f"look\nwhich ?\nA. red\nB. blue\n{INSTRUCTION}"
    assert turns_of([row(7, "red")])[0]["question"] == f"which ?\nA. red\n{INSTRUCTION}"


@pytest.mark.parametrize("answer", ["A", "B", "C", "D", " d ", "a"])
def test_every_rotation_is_asked_and_the_right_option_stays_right(answer):
    options = ["w", "x", "y", "z"]
    right = dict(zip("ABCD", options, strict=True))[answer.strip().upper()]
    turns = turns_of([row("12", *options, answer=answer)])
    assert [turn["index"] for turn in turns] == [12, 1_000_012, 2_000_012, 3_000_012]
    assert {turn["group"] for turn in turns} == {"12"}
    assert {text for _, text in letters(turns)} == {right}
    assert {letter for letter, _ in letters(turns)} == set("ABCD")
    assert list(turns[1]["choices"].values()) == ["x", "y", "z", "w"]
    assert "A. x\nB. y\nC. z\nD. w\n" in turns[1]["question"]


def test_questions_of_two_and_three_options():
    for options in (["x", "y"], ["x", "y", "z"], ["x", "y", "z", "nan"], ["x", "y", "z", " "]):
        turns = turns_of([row(1, *options, hint="nan")])
        count = len([text for text in options if text in "xyz"])
        assert len(turns) == count
        assert turns[0]["question"].startswith("which ?\nA. x")
        assert set(turns[0]["choices"]) == set("ABCD"[:count])


def test_files_that_hold_the_rotations_are_taken_as_they_are():
    first = row(5, "x", "y", answer="A")
    second = row(1_000_005, "y", "x", answer="B")
    other = row(6, "x", "y")
    turns = turns_of([first, other, second])
    assert [turn["index"] for turn in turns] == [5, 6, 1_000_005]
    assert [turn["group"] for turn in turns] == ["5", "6", "5"]
    assert letters(turns) == [("A", "x"), ("A", "x"), ("B", "x")]


def test_images_are_shared_by_index():
    """Before or after the row that has the image; numbers in parquet, texts in tables."""
    rows = [row("1", "x", image="3"), row("2", "x", image=" 3 "), row("3", "x"), row("4", "x", image=3)]
    assert [turn["image"] for turn in turns_of(rows)] == [IMAGE] * 4
    assert "question 1 shares the image of row 9, which has none" in reason([row(1, "x", image="9"), row(2, "x")])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(1, "x", "y", answer=None), "question 1 has no answer (a test split, whose answers are not public?)"),
        (row(1, "x", "y", answer="nan"), "question 1 has no answer"),
        (row(1, "x", "y", answer="C"), "question 1: its answer 'C' is not the letter of an option (A, B)"),
        (row(1), "question 1 has no options"),
        (row(1, "x", question=" "), "question 1 is empty"),
        (row(None, "x"), "column 'index' is missing or no number (preset mmbench)"),
        (row("one", "x"), "column 'index' is missing"),
        (row(float("nan"), "x"), "column 'index' is missing"),
        (row(0, "x"), "index 0 stands twice; a source holds one language and split"),
        (UnreadableRow("line 3: 2 cells"), "line 3: 2 cells"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_fault(bad, message):
    turns = turns_of([row(0, "x", "y"), bad])
    assert len(turns) == 3
    assert message in reason([row(0, "x", "y"), bad])


def test_a_limit_takes_whole_questions():
    rows = [row(n, "x", "y", "z") for n in range(4)]
    assert [turn["group"] for turn in turns_of(rows, 7)] == ["0"] * 3 + ["1"] * 3
    assert [turn["group"] for turn in turns_of(rows, 1)] == ["0"] * 3
    with_rotations = [*rows, *(row(n + 1_000_000, "x", "y", "z") for n in range(4))]
    assert [turn["index"] for turn in turns_of(with_rotations, 5)] == [0, 1, 1_000_000, 1_000_001]


def test_questions_of_a_test_split_are_asked_without_their_answers():
    rows = [("a.tsv", 1, row(7, "red", "blue", answer=None)), ("a.tsv", 2, row(8, "red", "blue", answer="C"))]
    *asked, bad = [turn for _, _, turn in questions(lambda: iter(rows), None, answered=False)]
    assert [(turn["answer"], list(turn["choices"].values())) for turn in asked] == [
        (None, ["red", "blue"]),
        (None, ["blue", "red"]),
    ]
    assert "its answer 'C' is not the letter of an option" in bad.reason
