"""From answered rows to accuracies: scores by the task's metric, groups of rows as one question."""

import json
from dataclasses import replace

import pytest

from pipeline.data.rows.records import Reference
from pipeline.evaluation.results import Evaluation, Prediction, TaskResult, scored


def predicted(task: str, value: float, group: str = "") -> Prediction:
    return Prediction(task, "id", "question", "answer", "prediction", value, "base", group=group)


def test_without_groups_accuracy_is_the_mean_score() -> None:
    scores = {"a": [1.0, 0.5, 0.0], "b": [0.3]}
    evaluation = Evaluation.of([predicted(task, value) for task, values in scores.items() for value in values])
    assert evaluation.accuracies() == {"a": pytest.approx(0.5), "b": 0.3}
    assert evaluation.row_accuracies() == {}


def test_a_group_is_right_only_if_all_its_rows_are() -> None:
    rows = {"first": [1, 1, 1, 1], "second": [1, 1, 0, 1], "third": [1, 1]}
    predictions = [predicted("mmbench", float(value), group) for group, values in rows.items() for value in values]
    evaluation = Evaluation.of([*predictions, predicted("digits", 1.0)])
    assert evaluation.accuracies() == {"mmbench": pytest.approx(2 / 3), "digits": 1.0}
    assert evaluation.row_accuracies() == {"mmbench": pytest.approx(9 / 10)}


def test_rows_without_a_group_stand_alone_beside_groups() -> None:
    predictions = [predicted("a", 1.0, "g"), predicted("a", 0.0, "g"), predicted("a", 1.0), predicted("a", 1.0)]
    assert Evaluation.of(predictions).accuracies() == {"a": pytest.approx(2 / 3)}


def test_a_groups_score_is_its_lowest() -> None:
    assert Evaluation.of([predicted("a", 0.9, "g"), predicted("a", 0.6, "g")]).accuracies() == {"a": 0.6}


def test_groups_of_different_columns_are_different() -> None:
    evaluation = Evaluation.of([predicted("a", 1.0, "0"), predicted("b", 0.0, "0"), predicted("b", 1.0)])
    assert evaluation.accuracies() == {"a": 1.0, "b": 0.5}


def test_the_order_of_rows_does_not_matter() -> None:
    predictions = [predicted("a", float(i % 3 > 0), f"g{i % 4}") for i in range(24)] + [predicted("a", 0.0)]
    backwards = Evaluation.of(predictions[::-1]).accuracies()
    assert backwards == {"a": pytest.approx(Evaluation.of(predictions).accuracies()["a"])}


def test_rotations_are_scored_and_counted_as_one_question() -> None:
    choices = [{"A": "dog", "B": "cat"}, {"A": "cat", "B": "dog"}]
    references = [Reference(answers=(right,), choices=c, group="7") for right, c in zip("BA", choices, strict=True)]
    answers = ["B", "The answer is B."]  # true to the letter, not to the cat
    predictions = [
        scored("animals", "mmbench", "7", "which?", reference.model_dump_json(), answer, "animals")
        for reference, answer in zip(references, answers, strict=True)
    ]
    assert [(p.answer, p.score, p.group) for p in predictions] == [("B", 1.0, "7"), ("A", 0.0, "7")]
    evaluation = Evaluation.of(predictions)
    assert evaluation.accuracies() == {"animals": 0.0}
    assert evaluation.row_accuracies() == {"animals": 0.5}


def test_who_answered_is_counted_by_column() -> None:
    to = {"a": ["a", "a", "b", "base"], "b": ["b"], "old": ["base", "a"]}
    predictions = [replace(predicted(task, 1.0), expert=e) for task, experts in to.items() for e in experts]
    evaluation = Evaluation.of(predictions)
    assert evaluation.routing_accuracy(["a", "b"]) == pytest.approx(4 / 7)
    assert evaluation.shares(["a", "b", "base"], ["a", "b", "old"]) == [[0.5, 0, 0.5], [0.25, 1, 0], [0.25, 0, 0.5]]


def test_an_evaluation_survives_json() -> None:
    evaluation = Evaluation.of([predicted("a", 1.0, "g"), predicted("a", 0.0), predicted("b", 0.5)])
    plain = json.loads(json.dumps(evaluation.to_json()))
    assert Evaluation.from_json(plain) == evaluation
    assert plain["a"]["samples"][0]["column"] == "a"  # the key of earlier releases


def test_as_many_samples_are_kept_as_are_asked_for() -> None:
    predictions = [predicted("a", value) for value in (0.0, 1.0, 1.0)]
    result = TaskResult.of(predictions, 2)
    assert (result.accuracy, result.samples) == (pytest.approx(2 / 3), tuple(predictions[:2]))
