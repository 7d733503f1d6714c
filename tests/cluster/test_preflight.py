"""What nodes hold, and what a user reads where it is not enough; no Ray."""

import pytest

from cluster.demand import Trainings, Worker
from cluster.nodes import KUBERAY, Node, Supply
from cluster.preflight import PreflightError, check, lacks_for_inference, lacks_for_trainings

LAPTOP = (Node({"CPU": 6}),)
GPUS = tuple(Node({"CPU": 16, "GPU": 1, "accelerator_type:L4": 1}, {"zone": zone, "market": "spot"}) for zone in "abc")


def lacks(trainings: Trainings, nodes: tuple[Node, ...]) -> str:
    return lacks_for_trainings(trainings, nodes, Supply(nodes)) or ""


@pytest.mark.parametrize(
    ("worker", "nodes", "slots"),
    [
        (Worker(2), LAPTOP, [3]),
        (Worker(4, 1), GPUS, [1, 1, 1]),
        (Worker(17, 1), GPUS, [0, 0, 0]),
        (Worker(1, 1, "L4"), GPUS, [1, 1, 1]),
        (Worker(1, 1, "A100"), GPUS, [0, 0, 0]),
        (Worker(1, 0, None, {"zone": "a"}), GPUS, [16, 0, 0]),
        (Worker(1, 0, None, {"zone": "!a"}), GPUS, [0, 16, 16]),
        (Worker(1, 0, None, {"zone": "in(a, b)"}), GPUS, [16, 16, 0]),
        (Worker(1, 0, None, {"zone": "!in(a,b)"}), GPUS, [0, 0, 16]),
        (Worker(1, 0, None, {"zone": "in(a,b)", "market": "!spot"}), GPUS, [0, 0, 0]),
        (Worker(1, 0, None, {"other": "!x"}), GPUS, [16, 16, 16]),
    ],
)
def test_places_of_a_node(worker, nodes, slots) -> None:
    assert [worker.slots(node) for node in nodes] == slots


@pytest.mark.parametrize(
    ("strategy", "workers", "trainings", "largest"),
    [
        ("PACK", 2, 4, 8),
        ("SPREAD", 3, 2, 8),
        ("STRICT_PACK", 2, 3, 4),
        ("STRICT_PACK", 5, 0, 4),
        ("STRICT_SPREAD", 2, 4, 3),
        ("STRICT_SPREAD", 3, 1, 3),
        ("STRICT_SPREAD", 4, 0, 3),
    ],
)
def test_places_by_strategy(strategy, workers, trainings, largest) -> None:
    """On nodes that hold 4, 3 and 1."""
    nodes = [Node({"CPU": cpus}) for cpus in (4, 3, 1)]
    asked = Trainings(Worker(1), workers, strategy=strategy)
    assert asked.that_fit(nodes) == trainings
    assert asked.workers_that_fit(nodes) == largest


def test_enough_lacks_nothing() -> None:
    assert lacks(Trainings(Worker(2), extra_cpus=4), LAPTOP) == ""
    assert lacks(Trainings(Worker(4, 1), 3), GPUS) == ""


@pytest.mark.parametrize(
    ("trainings", "nodes", "message"),
    [
        (
            Trainings(Worker(2), 99),
            LAPTOP,
            "99 worker(s) with 2 CPU(s) and 0 GPU(s) each: only 3 worker(s) fit; the cluster has 6 CPU(s) and 0 GPU(s) on "
            "1 node(s)\n    lower training.workers to 3, lower training.cpus_per_worker, or take a larger cluster (--address)",
        ),
        (
            Trainings(Worker(8)),
            LAPTOP,
            "1 worker(s) with 8 CPU(s) and 0 GPU(s) each: only 0 worker(s) fit; the cluster has 6 CPU(s) and 0 GPU(s) on "
            "1 node(s)\n    lower training.cpus_per_worker to 6, the CPUs of the largest such node, or take a larger cluster "
            "(--address)",
        ),
        (
            Trainings(Worker(1, 1)),
            LAPTOP,
            "1 worker(s) with 1 CPU(s) and 1 GPU(s) each: there is no GPU; the cluster has 6 CPU(s) and 0 GPU(s) on "
            "1 node(s)\n    set training.gpu=false, or submit to a cluster with GPUs (--address)",
        ),
        (
            Trainings(Worker(6), extra_cpus=2),
            LAPTOP,
            "1 worker(s) with 6 CPU(s) and 0 GPU(s) each, and 2 more CPU(s) for data and evaluation: 8 CPUs in all; the "
            "cluster has 6 CPU(s) and 0 GPU(s) on 1 node(s)\n    lower training.cpus_per_worker, a local Ray takes more "
            "logical CPUs than the machine has (connect(cpus=8)), or take a larger cluster (--address)",
        ),
        (
            Trainings(Worker(1, 1, "A100")),
            GPUS,
            "1 worker(s) with 1 CPU(s) and 1 GPU(s) each, on nodes with accelerator type A100: only 0 worker(s) fit; the "
            "cluster has 48 CPU(s) and 3 GPU(s) on 3 node(s)\n    no node has accelerator type A100: correct "
            "training.accelerator_type and training.label_selector, or take a larger cluster (--address)",
        ),
        (
            Trainings(Worker(1, 1), 2, strategy="STRICT_PACK"),
            GPUS,
            "2 worker(s) with 1 CPU(s) and 1 GPU(s) each, on one node (STRICT_PACK): only 1 worker(s) fit; the cluster has "
            "48 CPU(s) and 3 GPU(s) on 3 node(s)\n    lower training.workers to 1, or take a larger cluster (--address)",
        ),
        (
            Trainings(Worker(1, 1), 2, count=2),
            GPUS,
            "training.parallel_tasks=2 of 2 worker(s) with 1 CPU(s) and 1 GPU(s) each: only 3 worker(s) fit; the cluster has "
            "48 CPU(s) and 3 GPU(s) on 3 node(s)\n    lower training.parallel_tasks to 1, lower training.workers to 1, or "
            "take a larger cluster (--address)",
        ),
    ],
)
def test_what_lacks_is_told_with_numbers_and_remedies_that_help(trainings, nodes, message) -> None:
    assert lacks(trainings, nodes) == message


def test_a_remedy_never_asks_for_what_is_so() -> None:
    """One worker cannot become fewer, and one CPU cannot become less."""
    assert lacks(Trainings(Worker(1)), (Node({"CPU": 0}),)).endswith("\n    take a larger cluster (--address)")


def test_too_many_evaluators() -> None:
    supply = Supply(LAPTOP)
    assert lacks_for_inference(Worker(5), 1, LAPTOP, supply) is None
    missing = lacks_for_inference(Worker(1), 99, LAPTOP, supply) or ""
    assert "evaluation.workers=99 with 1 CPU(s)" in missing
    assert missing.endswith("lower evaluation.workers to 5, or take a larger cluster (--address)")
    assert "1 CPU for reading rows: only 0 of them fit" in (lacks_for_inference(Worker(6), 1, LAPTOP, supply) or "")
    assert "evaluation.gpus_per_worker" in (lacks_for_inference(Worker(1, 2), 1, LAPTOP, supply) or "")


def test_what_an_autoscaler_may_add_is_counted_and_its_limit_named() -> None:
    head = Node({"CPU": 0})
    supply = Supply((head,), (head, *GPUS), KUBERAY)

    def missing(workers: int):
        return lambda nodes: lacks_for_trainings(Trainings(Worker(8, 1), workers), nodes, supply)

    check(supply, missing(3))
    with pytest.raises(PreflightError) as error:
        check(supply, missing(4))
    assert str(error.value) == (
        "4 worker(s) with 8 CPU(s) and 1 GPU(s) each: only 3 worker(s) fit; the cluster has 48 CPU(s) and 3 GPU(s) on "
        "4 node(s) at most, with all that KubeRay's autoscaler may add\n    lower training.workers to 3, lower "
        "training.cpus_per_worker, or raise maxReplicas of a worker group"
    )
