"""How many trainings a cluster can run at the same time, and whether evaluation fits beside them."""

from dataclasses import dataclass
from functools import cached_property

from cluster.local import ClusterInfo, available_cpus
from cluster.preflight import PreflightError, check_inference, check_resources, trainings_that_fit
from pipeline.config import LearnConfig
from pipeline.models.inference import InferenceWorkers

SPARE_CPUS = 2
"""Logical CPUs that must be free beside training, for Ray Data."""


@dataclass(frozen=True)
class Capacity:
    """What a cluster can run at the same time, for one configuration."""

    config: LearnConfig
    cluster: ClusterInfo

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
        return min(wanted, len(self.config.stream.tasks))

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

    def check(self, *, trains: bool) -> None:
        """Raises PreflightError if the cluster is too small for the configuration.

        A single training takes turns with evaluation; several at a time need room for it beside them.
        """
        training, inference = self.config.training, self.inference
        if trains:
            check_resources(
                workers=training.workers,
                cpus_per_worker=training.cpus_per_worker,
                gpus_per_worker=int(training.gpu),
                extra_cpus=SPARE_CPUS,
                trainings=self.trainings,
            )
        if trains and self.trainings > 1 and not self.side_by_side:
            raise PreflightError(
                f"training.parallel_tasks={self.trainings} leaves no room for evaluation "
                f"(evaluation.workers={inference.count}): the cluster has {self.cluster.cpus:g} CPUs and "
                f"{self.cluster.gpus:g} GPUs\n"
                f"    lower training.parallel_tasks to {max(1, self._room)}, or evaluation.workers; `auto` takes what fits"
            )
        check_inference(
            workers=inference.count, cpus_per_worker=inference.cpus_per_worker, gpus_per_worker=inference.gpus
        )

    @cached_property
    def _room(self) -> int:
        """Number of trainings that fit beside inference; can be 0.

        Image features of a task's rows are computed by as many workers again, while others evaluate.
        """
        training, inference = self.config.training, self.inference
        return trainings_that_fit(
            workers=training.workers,
            cpus_per_worker=training.cpus_per_worker,
            gpus_per_worker=int(training.gpu),
            evaluators=inference.count * (1 if self.config.data.vision_cache == "off" else 2),
            cpus_per_evaluator=inference.cpus_per_worker,
            gpus_per_evaluator=inference.gpus,
            spare_cpus=SPARE_CPUS,
        )

    @property
    def _cpus(self) -> int:
        training, inference = self.config.training, self.inference
        return (
            self.trainings * training.workers * training.cpus_per_worker + inference.count * inference.cpus_per_worker
        )
