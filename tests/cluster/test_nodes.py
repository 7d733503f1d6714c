"""What autoscalers may add, read from the files that this project ships and as Ray's own autoscaler reads them; no cluster."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.nodes import MOST_NODES, Node, kuberay_workers, workers_of

FILES = Path(__file__).resolve().parents[2] / "cluster"

UP = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "gpu": {"min_workers": 0, "max_workers": 4, "resources": {"CPU": 16, "GPU": 1}},
    },
}


@pytest.fixture
def ray_cluster() -> dict[str, Any]:
    """The RayCluster for interactive use, as the API server returns it."""
    resource = yaml.safe_load((FILES / "kubernetes" / "raycluster.yaml").read_text())
    resource["metadata"]["namespace"] = "default"
    return resource


def test_all_workers_together_are_no_more_than_the_cluster_allows() -> None:
    assert workers_of(UP) == [Node({"CPU": 16, "GPU": 1})] * 3


def test_the_file_of_ray_up() -> None:
    workers = workers_of(yaml.safe_load((FILES / "ray-cluster.yaml").read_text()))
    assert [(node.cpus, node.gpus) for node in workers] == [(16, 1)] * 4


def test_a_ray_cluster_with_autoscaling_may_get_all_replicas(ray_cluster) -> None:
    workers = kuberay_workers(ray_cluster)
    assert [(node.cpus, node.gpus) for node in workers] == [(12, 1)] * 12
    assert [node.labels["ray.io/market-type"] for node in workers] == ["spot"] * 8 + ["on-demand"] * 4


def test_without_autoscaling_it_gets_the_replicas_that_are_asked_for(ray_cluster) -> None:
    ray_cluster["spec"]["enableInTreeAutoscaling"] = False
    ray_cluster["spec"]["workerGroupSpecs"][1]["replicas"] = 2
    assert [node.labels for node in kuberay_workers(ray_cluster)] == [{"ray.io/market-type": "on-demand"}] * 2


def test_a_group_without_a_maximum_is_not_counted_for_ever(ray_cluster) -> None:
    for group in ray_cluster["spec"]["workerGroupSpecs"]:
        group["maxReplicas"] = 2**31 - 1  # what KubeRay fills in
    assert len(kuberay_workers(ray_cluster)) == 2 * MOST_NODES
