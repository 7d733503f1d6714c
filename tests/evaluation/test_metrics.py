"""Scores of single answers: values worked out by hand, and what the docstrings promise of odd texts."""

import random

import pytest

from pipeline.config import TaskConfig
from pipeline.data.rows.records import Reference
from pipeline.evaluation.metrics import METRICS, anls, exact_match, mmbench, relaxed_accuracy, token_f1, vqa_accuracy
from pipeline.evaluation.metrics.choice import chosen_option


def accepting(*answers: str) -> Reference:
    return Reference(answers=answers)


def people(**counts: int) -> Reference:
    """The answers of people: `yes=7, no=3` is seven times yes, three times no."""
    return Reference(answers=tuple(answer for answer, count in counts.items() for _ in range(count)))


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"], 1.0),
        ("  Red \n square ", ["red square"], 1.0),
        ("red.", ["red"], 0.0),
        ("the red", ["red"], 0.0),
        ("1,200", ["1200"], 0.0),
        ("CAFÉ", ["café"], 1.0),
        ("红色", ["红色"], 1.0),
        ("blue", ["red", "Blue"], 1.0),
        ("", ["red"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, accepting(*answers)) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Denver Broncos", ["The Denver Broncos"], 1.0),
        ("the cat sat on the mat", ["A cat, on a mat!"], 2 * 3 / (4 + 3)),
        ("red red", ["red"], 2 * 1 / (2 + 1)),  # a word counts as often as both hold it
        ("red", ["blue", "red bus"], 2 * 1 / (1 + 2)),
        ("1,200", ["1200"], 1.0),
        ("santa-clara", ["santa clara"], 0.0),  # punctuation is deleted, not replaced
        ("anthem", ["them"], 0.0),  # only whole articles go
        ("naïve café", ["café"], 2 * 1 / (2 + 1)),
        ("", ["red"], 0.0),
        ("the", ["red"], 0.0),
        ("", ["The."], 1.0),  # no word left of either
    ],
)
def test_token_f1(prediction: str, answers: list[str], score: float) -> None:
    assert token_f1(prediction, accepting(*answers)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("105", ["100"], 1.0),
        ("95", ["100"], 1.0),
        ("105.1", ["100"], 0.0),
        ("94.9", ["100"], 0.0),
        ("-104", ["-100"], 1.0),
        ("104", ["-100"], 0.0),
        ("2008", ["2010"], 1.0),
        (" 1e3 ", ["1000"], 1.0),
        ("12%", ["0.12"], 1.0),
        ("12 %", ["12.5%"], 1.0),
        ("12", ["12%"], 0.0),
        ("12%", ["12"], 0.0),
        ("1,200", ["1200"], 0.0),  # a comma makes a text of it
        ("1,200", ["1,200"], 1.0),
        ("1,201", ["1,200"], 0.0),
        ("$5", ["5"], 0.0),
        ("5 apples", ["5"], 0.0),
        ("0", ["0"], 1.0),  # a zero is met by the same text alone
        ("0.0", ["0"], 0.0),
        ("0%", ["0%"], 1.0),
        ("0.01", ["0"], 0.0),
        ("0", ["5"], 0.0),
        ("Yes", ["yes"], 1.0),
        ("yes.", ["yes"], 0.0),
        ("nan", ["NaN"], 1.0),  # not finite: texts
        ("nan", ["5"], 0.0),
        ("inf", ["5"], 0.0),
        ("5", ["inf"], 0.0),
        ("１２", ["12"], 1.0),  # digits of another script are digits
        ("", ["5"], 0.0),
        ("%", ["5%"], 0.0),
        ("7", ["seven", "7.2"], 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, answers: list[str], score: float) -> None:
    assert relaxed_accuracy(prediction, accepting(*answers)) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello", ["hello"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["cd"], 0.0),
        ("ab", ["ac"], 0.5),
        ("abc", ["axy"], 0.0),
        ("1,200", ["1200"], 0.8),
        ("two\n words", ["Two words"], 1.0),
        ("naïve", ["naive"], 0.8),
        ("invoice 12", ["invoice 13", "nothing"], 0.9),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("", ["  "], 1.0),
        ("two  wards", ["two words"], 1 - 1 / 10),  # the length as it stands, not the collapsed 9
        (" two wards", ["two words"], 1 - 1 / 10),
        ("two wards", ["two   words"], 1 - 1 / 11),
        ("strasse", ["straße"], 1 - 2 / 7),
        ("maß", ["mas"], 1 - 1 / 4),  # "MASS" has four letters
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, accepting(*answers)) == pytest.approx(score)


def test_anls_of_a_half_is_exact() -> None:
    for length in range(1, 50):
        answer = "x" * 2 * length
        assert anls("x" * length, accepting(answer)) == 0.5
        assert anls("x" * (length - 1), accepting(answer)) == 0.0


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(agreeing: int, score: float) -> None:
    assert vqa_accuracy("yes", people(yes=agreeing, no=10 - agreeing)) == pytest.approx(score)


def test_vqa_accuracy_leaves_everyone_out_once() -> None:
    for seed in range(50):
        choose = random.Random(seed)
        answers = choose.choices(["red", "blue", "green"], k=choose.randint(4, 12))
        left_out = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
        mean = sum(min(others.count("red") / 3, 1) for others in left_out) / len(answers)
        assert vqa_accuracy("red", accepting(*answers)) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes.", "yes"),
        ("  two\n", "2"),
        ("none", "0"),
        ("the  dog", "A dog"),
        ("1,200", "1200"),
        ("10-11", "10 11"),  # a mark becomes a space
        ("yes, it is", "yes it is"),  # or goes, beside one
        ("a (red) bus", "red bus"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("YALL", "y'all"),
        ("3 oclock", "3 o'clock"),
        ("café!", "CAFÉ"),
    ],
)
def test_vqa_accuracy_normalises_both_sides(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, accepting(*[answer] * 10)) == 1.0
    assert vqa_accuracy(answer, accepting(*[prediction] * 10)) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("1.5", "15"), ("twenty", "20"), ("dogs", "dog"), ("its", "it's"), ("", "yes"), ("couldntve", "couldn't've")],
)
def test_vqa_accuracy_keeps_apart(prediction: str, answer: str) -> None:
    assert vqa_accuracy(prediction, accepting(*[answer] * 10)) == 0.0


def test_vqa_accuracy_normalises_whether_people_agree_or_not() -> None:
    """VQA's own code leaves all texts as they stand where all people gave the same answer."""
    assert vqa_accuracy("Two.", accepting(*["2"] * 10)) == 1.0
    assert vqa_accuracy("Two.", accepting(*["2"] * 9, "3")) == 1.0


def test_vqa_accuracy_of_fewer_people() -> None:
    assert vqa_accuracy("yes", people(yes=4)) == 1.0
    assert vqa_accuracy("yes", people(yes=1, no=3)) == pytest.approx((0 + 3 / 3) / 4)
    with pytest.raises(ValueError, match="ten people.*found 3.*exact_match"):
        vqa_accuracy("yes", people(yes=3))


ANIMALS = {"A": "dog", "B": "cat", "C": "black horse", "D": "cow"}
SCENES = {"A": "A man riding a horse", "B": "The cat", "C": "The cat is on the mat.", "D": "Vitamin B"}


@pytest.mark.parametrize(
    "prediction",
    [
        *["B", "b", "(B)", "B.", "b)", "[B]", "**B**", " B\n", '"B"'],
        *[
            "The answer is B",
            "The answer is B.",
            "answer: b",
            "Answer: (b)",
            "**Answer:** B",
            "the answer is: option b",
        ],
        *["B. cat", "(B) cat", "B: Cat.", "b) cat", "B cat", "cat", "Cat.", "A cat", "a cat", "A cat.", "It is a cat"],
        *["Option B", "I think it is B", "It is B because", "It must be B, a cat"],
        "Answer: B\nA dog would have longer legs, and a cow has horns.",
        "The correct answer is B. Option A is wrong since there is no dog.",
        "A small animal sits there, so (B)",
        "The answer is a cat",
    ],
)
def test_a_text_chooses_the_option(prediction: str) -> None:
    assert chosen_option(prediction, ANIMALS) == "B"
    assert mmbench(prediction, Reference(answers=("B",), choices=ANIMALS)) == 1.0
    assert mmbench(prediction, Reference(answers=("A",), choices=ANIMALS)) == 0.0


@pytest.mark.parametrize(
    "prediction",
    [
        *["", " ", ".", "E", "z", "no idea", "elephant"],
        *["A or B", "A and B", "A, B", "A/B", "The answer is A or B", "B. A.", "A B C D"],
        *["A red bus", "A bus", "A 3D model", "A German shepherd", "The answer is a pig", "The answer is A pig"],
        *["dog or cat", "C++", "25 °C", "the X-ray", "B-52", "A's"],
        "B, as far as can be said of something so small and far away",  # the letter stands too early
        "There is a very long text about many things, and in the middle of it stands a dog, but nobody looks at it.",
    ],
)
def test_a_text_chooses_no_option(prediction: str) -> None:
    assert chosen_option(prediction, ANIMALS) is None
    assert mmbench(prediction, Reference(answers=("A",), choices=ANIMALS)) == 0.0


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        ("A.", "A"),
        ("The answer is A", "A"),
        ("The answer is A because of the horse", "A"),
        ("answer: A\nExplanation: a horse", "A"),
        ("A is correct", "A"),
        ("A. A man riding a horse", "A"),
        ("A man riding a horse", "A"),
        ("a man riding a horse, it seems", "A"),
        ("The cat", "B"),  # although option C begins so
        ("C. The cat is on the mat", "C"),  # although B's text is part of it
        ("Vitamin B", "D"),  # although B is a letter
        ("vitamin b", "D"),
        ("The cat is on the mat", "C"),
        ("There is the cat", "B"),
    ],
)
def test_articles_and_options_within_options(prediction: str, letter: str) -> None:
    assert chosen_option(prediction, SCENES) == letter


AMBIGUOUS = {"A": "Vitamin C", "B": "an apple", "C": "a bottle of plan B", "D": "type A blood, or B"}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("holding Vitamin C", "A"),
        ("The woman is holding vitamin  C.", "A"),
        ("She is holding: vitamin\nC", "A"),
        ("It is B, not Vitamin C", "B"),
        ("The answer is C. She is not holding Vitamin C.", "C"),
        ("There is a bottle of plan B", "C"),
        ("This must be type A blood, or B", "D"),
        ("holding Vitamin D", "D"),  # no option's text: the letter
        ("holding Vitamin C or an apple", None),
    ],
)
def test_a_letter_inside_an_options_text_is_no_choice(prediction: str, letter: str | None) -> None:
    assert chosen_option(prediction, AMBIGUOUS) == letter


def test_options_that_are_letters_numbers_or_empty() -> None:
    letters = {"A": "B", "B": "A"}
    assert chosen_option("B", letters) == "B"
    assert chosen_option("-5", {"A": "5", "B": "-5"}) == "B"
    assert chosen_option("It is 5", {"A": "5", "B": "7.5"}) == "A"
    assert chosen_option("dog", {"A": "", "B": "dog"}) == "B"
    assert chosen_option("...", {"A": "", "B": "dog"}) is None
    assert chosen_option("这是猫", {"A": "狗和马", "B": "猫"}) == "B"


def test_mmbench_needs_options_and_a_letter() -> None:
    with pytest.raises(ValueError, match="mmbench: the row has no options"):
        mmbench("A", accepting("A"))
    with pytest.raises(ValueError, match="'dog' is not the capital letter of an option; letters: A, B, C, D"):
        mmbench("A", Reference(answers=("dog",), choices=ANIMALS))
    with pytest.raises(ValueError, match="'a' is not the capital letter of an option; letters: a, b"):
        mmbench("a", Reference(answers=("a",), choices={"a": "dog", "b": "cat"}))


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(
    "prediction", ["", " \n\t", "%", "nan", "-inf", "\0", "🙂", "e\u0301", "a" * 10_000, "(" * 5_000]
)
def test_no_text_breaks_a_metric(metric, prediction: str) -> None:
    reference = Reference(answers=("A", "nan", "0", "", "%"), choices={"A": "nan", "B": "🙂"})
    assert 0.0 <= metric(prediction, reference) <= 1.0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_can_be_named_in_a_task(name: str) -> None:
    assert TaskConfig(name="demo", eval={"path": "x.jsonl"}, metric=name).metric == name


def test_a_task_can_name_no_other_metric() -> None:
    assert set(METRICS) == set(TaskConfig.model_fields["metric"].annotation.__args__)
