"""What clusters of several shapes hold: trainings side by side, evaluators beside them."""

from pathlib import Path
from typing import Any

import pytest

from cluster import preflight
from cluster.local import ClusterInfo
from cluster.preflight import PreflightError
from pipeline.config import LearnConfig
from pipeline.learning import capacity
from pipeline.learning.capacity import Capacity

TASKS = 8
LAPTOP = [{"CPU": 6.0}]
"""Two real cores, and the spare CPUs of a Ray that was started here."""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_cpus", lambda: 2)


def of(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    *,
    training: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    features: bool = False,
    here: bool = False,
) -> Capacity:
    monkeypatch.setattr(preflight, "_nodes", lambda: nodes)
    tasks = [{"name": f"task{i}", "train": "demo://digits/train", "eval": "demo://digits/eval"} for i in range(TASKS)]
    config = LearnConfig.model_validate({
        "name": "room",
        "base": {"path": "tiny"},
        "stream": {"tasks": tasks},
        "training": training,
        "evaluation": evaluation or {},
        "data": {"vision_cache": "features" if features else "off"},
    })  # fmt: skip
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    return Capacity(config, ClusterInfo("here:1", here, cpus, gpus, len(nodes), None, Path(), 0.0))


@pytest.mark.parametrize(
    ("nodes", "training", "evaluation", "here", "trainings"),
    [
        (LAPTOP, {"cpus_per_worker": 1}, {}, True, 2),
        (LAPTOP, {"cpus_per_worker": 1}, {"workers": 2}, True, 2),
        (LAPTOP, {"cpus_per_worker": 1}, {"workers": 3}, True, 1),
        (LAPTOP, {"cpus_per_worker": 2}, {}, True, 1),
        ([{"CPU": 64.0, "GPU": 8.0}], {"gpu": True}, {}, False, 7),
        ([{"CPU": 16.0, "GPU": 8.0}], {"gpu": True}, {}, False, 6),
        ([{"CPU": 64.0, "GPU": 8.0}], {"gpu": True, "workers": 4}, {}, False, 1),
        ([{"CPU": 64.0, "GPU": 1.0}], {"gpu": True}, {}, False, 1),
        ([{"CPU": 5.0}] * 4, {"cpus_per_worker": 3}, {}, False, 3),
        ([{"CPU": 96.0, "GPU": 4.0}] * 2, {"gpu": True}, {"gpus_per_worker": 2}, False, 6),
    ],
)
def test_as_many_as_fit_beside_evaluation(monkeypatch, nodes, training, evaluation, here, trainings) -> None:
    room = of(monkeypatch, nodes, training=training | {"parallel_tasks": "auto"}, evaluation=evaluation, here=here)
    assert room.trainings == trainings
    room.check(trains=True)  # `auto` never asks for what is not there
    assert room.side_by_side or trainings == 1


def test_image_features_take_workers_of_their_own(monkeypatch) -> None:
    nodes = [{"CPU": 64.0, "GPU": 8.0}]
    assert of(monkeypatch, nodes, training={"gpu": True, "parallel_tasks": "auto"}, features=True).trainings == 6
    few = [{"CPU": 64.0, "GPU": 2.0}]
    assert of(monkeypatch, few, training={"gpu": True}).side_by_side
    assert not of(monkeypatch, few, training={"gpu": True}, features=True).side_by_side


def test_too_many_are_refused_with_what_fits(monkeypatch) -> None:
    room = of(monkeypatch, [{"CPU": 64.0, "GPU": 8.0}], training={"gpu": True, "parallel_tasks": 8})
    with pytest.raises(PreflightError, match="lower training.parallel_tasks to 7, or evaluation.workers"):
        room.check(trains=True)


def test_the_driver_leaves_the_cores_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_cpus", lambda: 8)
    many = [{"CPU": 12.0}]
    assert of(monkeypatch, many, training={"cpus_per_worker": 2}, here=True).driver_threads == 6
    assert of(monkeypatch, many, training={"cpus_per_worker": 2, "parallel_tasks": 3}, here=True).driver_threads == 2
    assert of(monkeypatch, many, training={"cpus_per_worker": 8}, here=True).driver_threads == 1
    # On a cluster training may be elsewhere.
    assert of(monkeypatch, many, training={"cpus_per_worker": 8}).driver_threads == 8
