"""What a sweep looks for."""

import pytest

from pipeline.config import ConfigError
from tuning.objective import Objective, pareto_front


def test_weights_are_a_weighted_mean_of_what_there_is():
    objective = Objective.read("accuracy=2,others=1,cost=-1")
    assert objective.of({"accuracy": 0.9, "others": 0.5, "cost": 0.1}) == pytest.approx((1.8 + 0.5 - 0.1) / 4)
    assert objective.of({"accuracy": 0.9, "cost": 0.3}) == pytest.approx((1.8 - 0.3) / 3)
    assert Objective.read(objective.text) == objective


def test_held_out_rows_take_the_place_of_evaluation_rows():
    assert Objective.read("accuracy").of({"accuracy": 0.9, "held_out": 0.7}) == 0.7


@pytest.mark.parametrize("text", ["", "acuracy=1", "accuracy=x", "accuracy=0", "pareto=1", "cost=nan", "cost=1,cost=2"])
def test_a_mistake_is_said(text):
    with pytest.raises(ConfigError, match=f"--objective {text}"):
        Objective.read(text)


def test_an_objective_that_no_trial_has_is_said():
    with pytest.raises(
        ConfigError, match="--objective others=1: trials have none of it.* weigh some of accuracy, cost"
    ):
        Objective.read("others").check(["accuracy", "cost"])
    Objective.read("others=1,cost=-1").check(["accuracy", "cost"])


def test_a_default_minds_what_others_lose():
    default = Objective.read("pareto")
    assert default.pareto
    assert default.of({"accuracy": 0.9, "others": 0.0}) < default.of({"accuracy": 0.8, "others": 0.8})


def test_a_trial_is_on_the_front_unless_another_beats_it():
    trials = [
        {"accuracy": 0.9, "others": 0.5, "cost": 1.0},
        {"accuracy": 0.8, "others": 0.6, "cost": 1.0},
        {"accuracy": 0.8, "others": 0.5, "cost": 1.0},  # the first is as good and better
        {"accuracy": 0.1, "others": 0.1, "cost": 0.1},
        {"accuracy": 0.9, "others": 0.5, "cost": 1.0},  # equal to the first
    ]
    assert pareto_front(trials) == [0, 1, 3, 4]


def test_searchers_are_given_what_is_measured():
    assert Objective.read("accuracy").optimized(["accuracy"]) == ("objective", "max")
    assert Objective.read("pareto").optimized(["accuracy", "cost"]) == (["selection", "cost"], ["max", "min"])
