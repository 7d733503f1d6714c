"""Authors of answers in an evaluation (the base, one expert, or a pool), and the calls of actors for them."""

from dataclasses import dataclass, field
from functools import cached_property

import ray

from pipeline.evaluation.actors import Work
from pipeline.evaluation.answers import pool_author
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.pages import Slices
from pipeline.routing.pool import Pool
from pipeline.routing.routes import MIXED, NULL_EXPERT
from pipeline.storage.mirror import Folder


@dataclass(frozen=True)
class PageRequest:
    """Prompts of a page that one author answers."""

    choice: int
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Authors:
    """Authors of answers in an evaluation, by choice (see `choices`)."""

    pool: Pool | None
    key: str
    """Name of the pool, under which mixed answers are stored."""
    folder: Folder | None
    """Folder of the pool, which all nodes see; needed for mixed answers."""
    _sent: dict[int, ray.ObjectRef] = field(default_factory=dict)

    def key_of(self, choice: int) -> str:
        """Returns the author's name in the answer store."""
        if choice in (NULL_EXPERT, MIXED):
            return BASE if choice == NULL_EXPERT else pool_author(self.key)
        return self._digests[choice]

    @cached_property
    def _digests(self) -> list[str]:
        assert self.pool is not None, "only pools have experts"
        return self.pool.digests

    def name_of(self, choice: int) -> str:
        """Returns the name of an expert, or that of the base."""
        return BASE if choice == NULL_EXPERT or self.pool is None else self.pool.names[choice]

    def own_of(self, task: str) -> str:
        """Returns who should answer the prompts of a task, or of a base ability."""
        return task if self.pool is not None and task in self.pool.names else BASE

    def work(self, request: PageRequest, location: Slices, max_new_tokens: int) -> Work:
        """Returns the actor call for a request."""
        rows = (request.prompts, max_new_tokens, location.rows, *location.blocks)
        if request.choice == MIXED:
            assert self.folder is not None, "a router that mixes needs the pool's folder"
            return Work("by_router", (self.key_of(MIXED), self.folder, *rows))
        experts = []  # in a list references are fetched only by actors that hold another expert
        if request.choice != NULL_EXPERT:
            assert self.pool is not None, "only pools have experts"
            if request.choice not in self._sent:
                # Without what answers alone do not need, and read now: not every node sees its files.
                self._sent[request.choice] = ray.put(self.pool.experts[self.name_of(request.choice)].adapter_alone())
            experts = [self._sent[request.choice]]
        return Work("by_expert", (self.key_of(request.choice), experts, *rows))
