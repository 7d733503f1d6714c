"""Scores of single answers: values worked out by hand, and the normalisation that the docstrings promise."""

import pytest

from pipeline.config import TaskConfig
from pipeline.evaluation.metrics import METRICS, anls, exact_match, relaxed_accuracy


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"], 1.0),
        ("  Red \n square ", ["red square"], 1.0),
        ("red.", ["red"], 0.0),
        ("blue", ["red", "Blue"], 1.0),
        ("", ["red"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], score: float) -> None:
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("105", ["100"], 1.0),
        ("95", ["100"], 1.0),
        ("105.1", ["100"], 0.0),
        ("-104", ["-100"], 1.0),
        ("104", ["-100"], 0.0),
        ("0.0", ["0"], 1.0),
        ("0.01", ["0"], 0.0),
        ("1,200", ["1200"], 1.0),
        ("12 %", ["0.12"], 1.0),
        ("12", ["12%"], 0.0),
        ("Yes", ["yes"], 1.0),
        ("nan", ["nan"], 1.0),
        ("inf", ["5"], 0.0),
        ("7", ["seven", "7.2"], 1.0),
    ],
)
def test_relaxed_accuracy(prediction: str, answers: list[str], score: float) -> None:
    assert relaxed_accuracy(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Hello", ["hello"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["cd"], 0.0),
        ("ab", ["ac"], 0.5),
        ("abc", ["axy"], 0.0),
        ("invoice 12", ["invoice 13", "nothing"], 0.9),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS.values())
@pytest.mark.parametrize("answers", [[], "red"])
def test_answers_must_be_a_list_that_holds_one(metric, answers) -> None:
    with pytest.raises(ValueError, match="at least one accepted answer"):
        metric("red", answers)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_can_be_named_in_a_task(name: str) -> None:
    assert TaskConfig(name="demo", eval={"path": "x.jsonl"}, metric=name).metric == name


def test_a_task_can_name_no_other_metric() -> None:
    assert set(METRICS) == set(TaskConfig.model_fields["metric"].annotation.__args__)
