"""A made-up sweep, for what is made of results."""

from itertools import product
from typing import Any

from tuning.objective import Objective
from tuning.results import SweepResult, Trial, ranked


def result() -> SweepResult:
    """Returns six trials that were evaluated, one that was stopped, one that failed."""
    trials = []
    for number, (rank, temperature) in enumerate(product((4, 8, 16), (0.2, 5.0)), 1):
        metrics: dict[str, Any] = {
            "accuracy": 0.8 + rank / 100,
            "others": 0.9 - temperature / 100,
            "abilities": 0.9,
            "cost": rank / 80,
            "training_seconds": rank * 3.0,
            "evaluation_seconds": 1.0,
            "expert_loss": 1 / rank,
            "expert": f"expert{rank}",
            "accuracies": {"later": 0.8 + rank / 100},
        }
        metrics["objective"] = (metrics["accuracy"] + metrics["others"] + metrics["abilities"]) / 3
        point = {"expert.rank": rank, "router.temperature": temperature}
        trials.append(Trial(number, point, point, "done", metrics))
    stopped = {"expert.rank": 32, "router.temperature": 0.2}
    trials.append(Trial(7, stopped, stopped, "stopped", {"step": 50, "validation_accuracy": 0.1, "objective": 0.1}))
    failed = {"expert.rank": 64, "router.temperature": 0.2}
    trials.append(Trial(8, failed, failed, "failed", error="task 'later': the loss is <nan> at step 3"))
    objective = Objective.read("accuracy=1,others=1,abilities=1")
    return SweepResult(ranked(trials), objective, 100.0, {"expert4": 20.0, "expert8": 30.0}, {"expert4": [1.0, 0.5]})


def summary() -> dict[str, Any]:
    """Returns the summary of such a sweep."""
    made = {"name": "demo", "command": "pointsman sweep demo.yaml", "seed": 0, "git_commit": None}
    return {
        **made,
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"ray": "2.60"},
        "task": "later",
        "selected_on": "later holds no rows out.",
        **result().summary(),
    }
