"""What clusters of several shapes hold: trainings side by side, evaluators beside them."""

from pathlib import Path
from typing import Any

import pytest

from cluster.local import ClusterInfo
from cluster.nodes import Node, Supply
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
    nodes: list[dict[str, float]],
    *,
    training: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    features: bool = False,
    here: bool = False,
    to_come: tuple[dict[str, float], ...] = (),
) -> Capacity:
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
    supply = Supply(tuple(Node(node) for node in nodes), tuple(Node(node) for node in to_come), "the autoscaler")
    return Capacity(config, ClusterInfo("here:1", here, cpus, gpus, len(nodes), None, Path(), 0.0), supply)


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
def test_as_many_as_fit_beside_evaluation(nodes, training, evaluation, here, trainings) -> None:
    room = of(nodes, training=training | {"parallel_tasks": "auto"}, evaluation=evaluation, here=here)
    assert room.trainings == trainings
    room.check(trains=True)  # `auto` never asks for what is not there
    assert room.side_by_side or trainings == 1


def test_image_features_take_workers_of_their_own() -> None:
    nodes = [{"CPU": 64.0, "GPU": 8.0}]
    assert of(nodes, training={"gpu": True, "parallel_tasks": "auto"}, features=True).trainings == 6
    few = [{"CPU": 64.0, "GPU": 2.0}]
    assert of(few, training={"gpu": True}).side_by_side
    assert not of(few, training={"gpu": True}, features=True).side_by_side


def test_too_many_are_refused_with_what_fits() -> None:
    room = of([{"CPU": 64.0, "GPU": 8.0}], training={"gpu": True, "parallel_tasks": 8})
    with pytest.raises(PreflightError, match="lower training.parallel_tasks to 7, or evaluation.workers"):
        room.check(trains=True)


def test_the_driver_leaves_the_cores_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_cpus", lambda: 8)
    many = [{"CPU": 12.0}]
    assert of(many, training={"cpus_per_worker": 2}, here=True).driver_threads == 6
    assert of(many, training={"cpus_per_worker": 2, "parallel_tasks": 3}, here=True).driver_threads == 2
    assert of(many, training={"cpus_per_worker": 8}, here=True).driver_threads == 1
    # On a cluster training may be elsewhere.
    assert of(many, training={"cpus_per_worker": 8}).driver_threads == 8


def test_nodes_that_may_come_are_counted_and_waited_for() -> None:
    head, gpu = {"CPU": 0.0}, {"CPU": 16.0, "GPU": 1.0}
    asked = {"gpu": True, "parallel_tasks": "auto"}
    room = of([head], training=asked, to_come=(head, gpu, gpu, gpu))
    assert room.trainings == 2, "one GPU evaluates"
    room.check(trains=True)
    assert room.lacks(room.supply.alive, trains=True) is not None
    assert room.lacks(room.supply.at_most, trains=True) is None
    with pytest.raises(PreflightError, match=r"(?s)only 3 worker\(s\) fit.*all that the autoscaler may add"):
        of([head], training={"gpu": True, "workers": 4}, to_come=(head, gpu, gpu, gpu)).check(trains=True)
    # What is there counts even where the autoscaler knows nothing of it.
    of([gpu, gpu], training={"gpu": True, "workers": 2}, to_come=(head,)).check(trains=True)
