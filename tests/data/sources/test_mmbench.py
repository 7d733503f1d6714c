"""MMBench's layout: prompt, rotations, shared images."""

import pytest

from pipeline.data.errors import UnreadableRow
from pipeline.data.sources.mmbench import INSTRUCTION, questions

PICTURE = "A" * 100
"""What is longer than an index: an image."""


def row(index, *options: str | None, answer="A", image=PICTURE, **more) -> dict:
    cells = dict(zip("ABCD", [*options, *[None] * 4], strict=False))
    return {"index": index, "question": "which ?", "answer": answer, "image": image} | cells | more


def asked(rows: list, limit: int | None = None) -> list:
    numbered = [("a.tsv", number, entry) for number, entry in enumerate(rows, start=1)]
    return [turn for _, _, turn in questions(lambda: iter(numbered), limit)]


def letters(found: list) -> list[tuple[str, str]]:
    return [(turn["answer"], turn["choices"][turn["answer"]]) for turn in found]


def reason(rows: list) -> str:
    (fault,) = [turn for turn in asked(rows) if isinstance(turn, UnreadableRow)]
    return fault.reason


def test_the_prompt_as_published():
    (first, _) = asked([row(7, "red", "blue", hint="look")])
    assert first["question"] == f"look\nwhich ?\nA. red\nB. blue\n{INSTRUCTION}"
    assert asked([row(7, "red")])[0]["question"] == f"which ?\nA. red\n{INSTRUCTION}"


@pytest.mark.parametrize("answer", ["A", "B", "C", "D", " d ", "a"])
def test_every_rotation_is_asked_and_the_right_option_stays_right(answer):
    options = ["w", "x", "y", "z"]
    right = dict(zip("ABCD", options, strict=True))[answer.strip().upper()]
    found = asked([row("12", *options, answer=answer)])
    assert [turn["index"] for turn in found] == [12, 1_000_012, 2_000_012, 3_000_012]
    assert {turn["group"] for turn in found} == {"12"}
    assert {text for _, text in letters(found)} == {right}
    assert {letter for letter, _ in letters(found)} == set("ABCD")
    assert list(found[1]["choices"].values()) == ["x", "y", "z", "w"]
    assert "A. x\nB. y\nC. z\nD. w\n" in found[1]["question"]


def test_questions_of_two_and_three_options():
    for options in (["x", "y"], ["x", "y", "z"], ["x", "y", "z", "nan"], ["x", "y", "z", " "]):
        found = asked([row(1, *options, hint="nan")])
        count = len([text for text in options if text in "xyz"])
        assert len(found) == count
        assert found[0]["question"].startswith("which ?\nA. x")
        assert set(found[0]["choices"]) == set("ABCD"[:count])


def test_files_that_hold_the_rotations_are_taken_as_they_are():
    first = row(5, "x", "y", answer="A")
    second = row(1_000_005, "y", "x", answer="B")
    other = row(6, "x", "y")
    found = asked([first, other, second])
    assert [turn["index"] for turn in found] == [5, 6, 1_000_005]
    assert [turn["group"] for turn in found] == ["5", "6", "5"]
    assert letters(found) == [("A", "x"), ("A", "x"), ("B", "x")]


def test_images_are_shared_by_index():
    """Before or after the row that has the image; numbers in parquet, texts in tables."""
    rows = [row("1", "x", image="3"), row("2", "x", image=" 3 "), row("3", "x"), row("4", "x", image=3)]
    assert [turn["image"] for turn in asked(rows)] == [PICTURE] * 4
    assert "question 1 shares the image of row 9, which has none" in reason([row(1, "x", image="9"), row(2, "x")])


@pytest.mark.parametrize(
    ("bad", "said"),
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
def test_a_question_that_cannot_be_asked_is_one_fault(bad, said):
    found = asked([row(0, "x", "y"), bad])
    assert len(found) == 3
    assert said in reason([row(0, "x", "y"), bad])


def test_a_limit_takes_whole_questions():
    rows = [row(n, "x", "y", "z") for n in range(4)]
    assert [turn["group"] for turn in asked(rows, 7)] == ["0"] * 3 + ["1"] * 3
    assert [turn["group"] for turn in asked(rows, 1)] == ["0"] * 3
    held = [*rows, *(row(n + 1_000_000, "x", "y", "z") for n in range(4))]
    assert [turn["index"] for turn in asked(held, 5)] == [0, 1, 1_000_000, 1_000_001]
