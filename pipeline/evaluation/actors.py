"""Actors that hold the base, and the calls that they work off."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.data import ExecutionResources

from pipeline.models.inference import InferenceWorkers

Tag = TypeVar("Tag")

AHEAD = 2
"""Calls queued per actor: the next one's arguments are fetched while it computes."""
FAILURES = 2
"""Restarts of an actor, and retries of its calls, when its process or node dies."""


@dataclass(frozen=True)
class Work:
    """A call of an actor."""

    method: str
    arguments: tuple[Any, ...]


class PredictorActors:
    """`workers.count` predictors, each `actor(*arguments)`; they start with the first call and free their resources at the end.

    `make_room` is called before they start. A failed call ends them all; later calls start new ones.
    """

    def __init__(
        self,
        actor: type[Any],
        *arguments: Any,
        workers: InferenceWorkers,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._actor, self._arguments, self._workers = actor, arguments, workers
        self.make_room = make_room
        self._actors: list[Any] = []
        self._ended = False

    def __enter__(self) -> "PredictorActors":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self, *, for_good: bool = False) -> None:
        """Ends the actors, whatever they compute; later calls start new ones, unless `for_good`."""
        self._ended |= for_good
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _start(self) -> None:
        if self._ended:
            raise RuntimeError("the run is over: there are no predictors any more")
        self.make_room()
        actor_class = ray.remote(
            num_cpus=self._workers.cpus_per_worker,
            num_gpus=self._workers.gpus or None,
            max_restarts=FAILURES,
            max_task_retries=FAILURES,
        )(self._actor)
        self._actors = [actor_class.remote(*self._arguments) for _ in range(self._workers.count)]

    def start(self) -> None:
        """Starts the actors, unless they have started, and waits until they have loaded what they hold."""
        try:
            if not self._actors:
                self._start()
            ray.get([actor.__ray_ready__.remote() for actor in self._actors])
        except BaseException:
            self.close()
            raise

    def run(self, pieces: Iterable[tuple[Tag, Work]]) -> Iterator[tuple[Tag, Any]]:
        """Yields the result of each call with its tag, in order of completion.

        Calls are drawn when an actor is free for them, so their arguments never pile up.
        """
        free: deque[Any] = deque()
        running: dict[ray.ObjectRef, tuple[Any, Tag]] = {}

        def done() -> Iterator[tuple[Tag, Any]]:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            actor, tag = running.pop(ref)
            free.append(actor)
            yield tag, ray.get(ref)

        try:
            for tag, work in pieces:
                if not self._actors:
                    self._start()
                if not free and not running:
                    free.extend(self._actors * AHEAD)
                while not free:
                    yield from done()
                actor = free.popleft()
                running[getattr(actor, work.method).remote(*work.arguments)] = actor, tag
            while running:
                yield from done()
        except BaseException:
            self.close()
            raise

    def beside(self, rows: ray.data.Dataset) -> ray.data.Dataset:
        """Limits the reading of rows to the CPUs that the actors leave free."""
        left = ray.cluster_resources().get("CPU", 1.0) - self._workers.count * self._workers.cpus_per_worker
        rows.context.execution_options.resource_limits = ExecutionResources(cpu=max(1.0, left))
        return rows
