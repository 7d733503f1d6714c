"""What workers ask of nodes, and how many of them nodes hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray.util.placement_group import PlacementGroup, placement_group

from cluster.nodes import Node
from pipeline.config import PlacementStrategy


@dataclass(frozen=True)
class Worker:
    """What one worker books; it lies on one node."""

    cpus: float
    gpus: float = 0
    accelerator_type: str | None = None
    """Ray's name of the GPU, e.g. A100: a resource of the nodes that have it."""
    label_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node must have, in Ray's syntax: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""

    def slots(self, node: Node) -> int:
        """Returns how many workers of this kind a node holds."""
        if not self.may_lie_on(node):
            return 0
        slots = int(node.cpus // self.cpus)
        return min(slots, int(node.gpus // self.gpus)) if self.gpus else slots

    def may_lie_on(self, node: Node) -> bool:
        """Returns whether a node is of the right kind, be it too small."""
        typed = self.accelerator_type is None or f"accelerator_type:{self.accelerator_type}" in node.resources
        return typed and all(_matches(node.labels.get(name), rule) for name, rule in self.label_selector.items())

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one worker, as placement groups take them."""
        resources = {"CPU": self.cpus, "GPU": self.gpus}
        if self.accelerator_type is not None:
            resources[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return {name: amount for name, amount in resources.items() if amount}

    @property
    def kind(self) -> str:
        """Which nodes it takes, for messages; empty if any."""
        labels = [f"label {name}={rule}" for name, rule in self.label_selector.items()]
        return " and ".join(
            [*([f"accelerator type {self.accelerator_type}"] if self.accelerator_type else []), *labels]
        )

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU(s) and {self.gpus:g} GPU(s) each" + (
            f", on nodes with {self.kind}" if self.kind else ""
        )


def _matches(value: str | None, rule: str) -> bool:
    """Returns whether a node's label satisfies a rule of a label selector."""
    refused = rule.startswith("!")
    rule = rule.removeprefix("!")
    listed = rule.removeprefix("in(").removesuffix(")").split(",") if rule.startswith("in(") else [rule]
    return (value in [entry.strip() for entry in listed]) != refused


@dataclass(frozen=True)
class Group:
    """Workers that start together."""

    worker: Worker
    workers: int
    strategy: PlacementStrategy = "PACK"

    def place(self) -> PlacementGroup:
        """Asks the connected cluster for their places, as Ray Train does; returns at once."""
        return placement_group(
            [self.worker.bundle] * self.workers,
            strategy=self.strategy,
            bundle_label_selector=[dict(self.worker.label_selector)] * self.workers,
        )


@dataclass(frozen=True)
class Trainings:
    """Trainings at the same time, and all that must fit beside them."""

    worker: Worker
    workers: int = 1
    """Workers of one training."""
    count: int = 1
    strategy: PlacementStrategy = "PACK"
    extra_cpus: float = 0
    """Logical CPUs for all else: readers, evaluators, trial drivers."""

    @property
    def groups(self) -> list[Group]:
        """The workers of each training."""
        return [Group(self.worker, self.workers, self.strategy)] * self.count

    def that_fit(self, nodes: Sequence[Node]) -> int:
        """Returns how many trainings of so many workers nodes hold, by the places for their workers alone."""
        slots = [self.worker.slots(node) for node in nodes]
        if self.strategy == "STRICT_PACK":
            return sum(places // self.workers for places in slots)
        if self.strategy == "STRICT_SPREAD":
            # Of each training a node holds one worker at most.
            most = max(slots, default=0)
            return max((n for n in range(most + 1) if sum(min(s, n) for s in slots) >= n * self.workers), default=0)
        return sum(slots) // self.workers

    def workers_that_fit(self, nodes: Sequence[Node]) -> int:
        """Returns the largest number of workers per training with which all trainings fit; 0 if none."""
        slots = [self.worker.slots(node) for node in nodes]
        if self.strategy == "STRICT_PACK":
            return max(
                (n for n in range(1, max(slots, default=0) + 1) if sum(s // n for s in slots) >= self.count), default=0
            )
        if self.strategy == "STRICT_SPREAD":
            return sum(min(places, self.count) for places in slots) // self.count
        return sum(slots) // self.count

    def __str__(self) -> str:
        demand = f"{self.workers} worker(s) with {self.worker}"
        if self.strategy.startswith("STRICT") and self.workers > 1:
            demand += f", {'on one node' if self.strategy == 'STRICT_PACK' else 'on as many nodes'} ({self.strategy})"
        if self.count > 1:
            demand = f"training.parallel_tasks={self.count} of {demand}"
        return demand + (f", and {self.extra_cpus:g} more CPU(s) for data and evaluation" if self.extra_cpus else "")
