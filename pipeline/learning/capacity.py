"""How many trainings a cluster can run at the same time, and whether evaluation fits beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.demand import Group, Trainings, Worker
from cluster.local import ClusterInfo, available_cpus
from cluster.nodes import Node, Supply, cluster_supply
from cluster.preflight import check, lacks_for_inference, lacks_for_trainings, trainings_that_fit
from pipeline.config import LearnConfig
from pipeline.models.inference import InferenceWorkers

SPARE_CPUS = 2
"""Logical CPUs that must be free beside training, for Ray Data."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster can run at the same time, for one configuration."""

    config: LearnConfig
    cluster: ClusterInfo
    known: Supply | None = None
    """The nodes, where the caller knows them; default: those of the cluster that this process has joined."""
    most: int | None = None
    """Number of trainings that there are; default: one per task of the stream."""

    @cached_property
    def supply(self) -> Supply:
        """The nodes that there were when it was first asked for, and those that an autoscaler may add."""
        return self.known or cluster_supply()

    @property
    def inference(self) -> InferenceWorkers:
        """The inference workers: they read base prompts, encode images and evaluate."""
        return InferenceWorkers.of(self.config.training, self.config.evaluation)

    @cached_property
    def trainings(self) -> int:
        """Number of tasks that are trained at the same time: `training.parallel_tasks`, or as many as fit.

        Ray started here has more CPUs in its books than the machine has: then the real ones count, and evaluation is given
        what is left of them.
        """
        training, wanted = self.config.training, self.config.training.parallel_tasks
        if isinstance(wanted, str):
            fit = self._room
            if self.cluster.started and not training.gpu:
                fit = min(fit, available_cpus() // (training.workers * training.cpus_per_worker))
            wanted = max(1, fit)
        return min(wanted, len(self.config.stream.tasks) if self.most is None else self.most)

    @property
    def side_by_side(self) -> bool:
        """Whether training workers and inference workers fit on the cluster together."""
        return self.trainings <= self._room

    @property
    def undisturbed(self) -> bool:
        """Whether training and inference can compute at the same time without slowing each other down.

        Ray started here has more CPUs in its books than the machine has, so that what waits does not block what works.
        """
        return self.side_by_side and not (self.cluster.started and available_cpus() < self._cpus)

    @property
    def ahead(self) -> bool:
        """Whether the next tasks are trained while earlier pools are evaluated; if not, both take turns."""
        return self.trainings > 1 or self.undisturbed

    @property
    def driver_threads(self) -> int:
        """Threads of torch in the driver, where routers are solved: the cores of this machine that no training uses.

        More would not be faster: threads that wait for each other then hold up the steps.
        """
        training = self.config.training
        busy_cpus = (
            self.trainings * training.workers * training.cpus_per_worker
            if self.cluster.started and not training.gpu
            else 0
        )
        return max(1, available_cpus() - busy_cpus)

    @property
    def demand(self) -> Trainings:
        """The trainings at the same time, with what reading rows takes beside them."""
        return replace(self._one_training, count=self.trainings)

    def groups(self, *, trains: bool) -> list[Group]:
        """Returns the workers that are needed, each group at once."""
        return [*(self.demand.groups if trains else ()), Group(self._evaluator, self.inference.count)]

    def check(self, *, trains: bool) -> None:
        """Raises PreflightError if the cluster is too small for the configuration, whatever its autoscaler adds."""
        check(self.supply, lambda nodes: self.lacks(nodes, trains=trains))

    def lacks(self, nodes: Sequence[Node], *, trains: bool) -> str | None:
        """Returns what nodes lack for the configuration; None if nothing.

        A single training takes turns with evaluation; several at a time need room for it beside them.
        """
        inference = self.inference
        if trains and (missing := lacks_for_trainings(self.demand, nodes, self.supply)) is not None:
            return missing
        if trains and self.trainings > 1 and (room := self._room_on(nodes)) < self.trainings:
            cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
            return (
                f"training.parallel_tasks={self.trainings} leaves no room for evaluation "
                f"(evaluation.workers={inference.count}): the cluster has {cpus:g} CPUs and {gpus:g} GPUs\n"
                f"    lower training.parallel_tasks to {max(1, room)}, or evaluation.workers; `auto` takes what fits"
            )
        return lacks_for_inference(self._evaluator, inference.count, nodes, self.supply)

    @cached_property
    def _room(self) -> int:
        """Number of trainings that fit beside inference, now or with what an autoscaler may add; can be 0."""
        return max(self._room_on(nodes) for nodes in self.supply.stages)

    def _room_on(self, nodes: Sequence[Node]) -> int:
        """Returns how many trainings fit on nodes beside inference.

        Image features of a task's rows are computed by as many workers again, while others evaluate.
        """
        evaluators = self.inference.count * (1 if self.config.data.vision_cache == "off" else 2)
        return trainings_that_fit(self._one_training, self._evaluator, evaluators, nodes)

    @property
    def _one_training(self) -> Trainings:
        training = self.config.training
        worker = Worker(training.cpus_per_worker, int(training.gpu), training.accelerator_type, training.label_selector)
        return Trainings(worker, training.workers, strategy=training.placement_strategy, extra_cpus=SPARE_CPUS)

    @property
    def _evaluator(self) -> Worker:
        return Worker(self.inference.cpus_per_worker, self.inference.gpus)

    @property
    def _cpus(self) -> int:
        training, inference = self.config.training, self.inference
        return (
            self.trainings * training.workers * training.cpus_per_worker + inference.count * inference.cpus_per_worker
        )
