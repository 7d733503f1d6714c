"""The nodes of a cluster: those alive, and those that an autoscaler may add.

Three places tell what an autoscaler may add, in this order: the configuration that a platform reports to the cluster's control
store, KubeRay's RayCluster resource (the head's pod may read it where autoscaling is on; KubeRay's autoscaler reports nothing),
and the file that `ray up` leaves on the head.
"""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import requests
import yaml
from ray._private.state import state

HEAD = "node:__internal_head__"
"""Resource that only the head has."""

MOST_NODES = 1000
"""Nodes of one group that are counted; groups without a maximum have as many."""

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where Kubernetes tells a pod its namespace."""

BOOTSTRAP = "ray_bootstrap_config.yaml"
"""File that `ray up` puts into the home folder on the head, where drivers of submitted jobs run."""


@dataclass(frozen=True)
class Node:
    """What a node has, or would have: the autoscaler knows no more of one that is not there."""

    resources: Mapping[str, float]
    """CPU, GPU, memory in bytes, `accelerator_type:<type>`, and custom resources."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        """Logical CPUs."""
        return self.resources.get("CPU", 0.0)

    @property
    def gpus(self) -> float:
        """GPUs."""
        return self.resources.get("GPU", 0.0)

    def without(self, cpus: float, gpus: float) -> "Node":
        """Returns the node with less of both."""
        return Node({**self.resources, "CPU": self.cpus - cpus, "GPU": self.gpus - gpus}, self.labels)


@dataclass(frozen=True)
class Supply:
    """The nodes of a cluster, now and at most."""

    alive: tuple[Node, ...]
    at_most: tuple[Node, ...] = ()
    """All nodes that there can be, the head included; empty where nothing may be added."""
    autoscaler: str | None = None
    """Who adds them, for messages."""

    @property
    def stages(self) -> tuple[tuple[Node, ...], ...]:
        """The nodes now, then all that there can be."""
        return (self.alive, self.at_most) if self.at_most else (self.alive,)

    @property
    def maximum(self) -> str | None:
        """The setting that limits what may be added."""
        return _MAXIMUM.get(self.autoscaler or "")


KUBERAY, RAY_UP, REPORTED = "KubeRay's autoscaler", "the autoscaler of `ray up`", "the cluster's autoscaler"

_MAXIMUM = {
    KUBERAY: "maxReplicas of a worker group",
    RAY_UP: "max_workers in the cluster's file",
    REPORTED: "the largest size of the cluster",
}


def cluster_supply() -> Supply:
    """Returns the nodes of the connected cluster."""
    alive = tuple(Node(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"])
    for autoscaler, read in ((REPORTED, _reported), (KUBERAY, _kuberay), (RAY_UP, _ray_up)):
        if (to_come := read()) is not None:
            heads = tuple(node for node in alive if HEAD in node.resources)
            return Supply(alive, (*heads, *to_come), autoscaler)
    return Supply(alive)


def totals(nodes: Iterable[Node]) -> str:
    """Returns what nodes have together, for messages."""
    nodes = list(nodes)
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"{cpus:g} CPU(s) and {gpus:g} GPU(s) on {len(nodes)} node(s)"


def _reported() -> list[Node] | None:
    """Returns the workers that the cluster's configuration in the control store allows."""
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return [
        Node(dict(group.resources))
        for group in config.node_group_configs
        for _ in range(MOST_NODES if group.max_count == -1 else min(group.max_count, MOST_NODES))
    ]


def _kuberay() -> list[Node] | None:
    """Returns the workers that the RayCluster resource of this pod's cluster allows."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")
    if not namespace and NAMESPACE.is_file():
        namespace = NAMESPACE.read_text().strip()
    if not name or not namespace:
        return None
    from ray.autoscaler._private.kuberay import node_provider  # its libraries are for clusters on Kubernetes alone

    try:
        resource = node_provider.KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except (requests.RequestException, OSError):  # without an autoscaler this pod has no right to read it
        return None
    return kuberay_workers(resource)


def kuberay_workers(resource: Mapping[str, Any]) -> list[Node]:
    """Returns the workers that a RayCluster resource allows, as Ray's own autoscaler reads it.

    Without autoscaling these are `replicas` of each group, whose pods may still be on their way.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config

    resource = deepcopy(dict(resource))
    if not resource["spec"].get("enableInTreeAutoscaling"):
        for group in resource["spec"].get("workerGroupSpecs", ()):
            group["minReplicas"] = group["maxReplicas"] = group.get("replicas", 0)
    return workers_of(autoscaling_config._derive_autoscaling_config_from_ray_cr(resource))


def _ray_up() -> list[Node] | None:
    """Returns the workers that the file of `ray up` allows."""
    plan = Path.home() / BOOTSTRAP
    if "RAY_ADDRESS" not in os.environ or not plan.is_file():
        return None
    return workers_of(yaml.safe_load(plan.read_text()))


def workers_of(config: Mapping[str, Any]) -> list[Node]:
    """Returns the workers that a configuration of Ray's autoscaler allows."""
    workers = [
        Node(node_type.get("resources", {}), node_type.get("labels", {}))
        for name, node_type in config["available_node_types"].items()
        if name != config["head_node_type"]
        for _ in range(min(node_type.get("max_workers", config["max_workers"]), MOST_NODES))
    ]
    return workers[: config["max_workers"]]
