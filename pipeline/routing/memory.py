"""Which experts' weights lie on the model's devices: those that calls use, and of all others those that were used last.

Routers know every expert of a pool by its statistics. What a batch needs beside them are the adapters of those that it is
routed to: they are read, memory-mapped, into pages beside the Linears that hold as many experts as a limit in bytes allows,
instead of those that nobody has used for longest.

    page      0            1            2
    Linear    clock A, B   digits A, B  echo A, B       rows 0..R, R..2R, 2R..3R of one tensor; a row of zeros at the end

A call holds its experts' pages until it is gone (its KV cache holds it), so that no other thread's batch takes them away.
Where the running calls need more experts than there are pages, a call gets weights of its own for as long as it lasts: memory
then goes beyond the limit, results are never wrong. Shapes: E experts of the pool, R rank, D and O widths of a Linear.
"""

import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.routing.adapters import ranks_of
from pipeline.routing.expert import Expert
from pipeline.routing.layer_classifiers import LayerClassifier, layer_classifiers
from pipeline.routing.pool import Pool
from pipeline.routing.routed_linear import LinearExperts, PoolExperts, Slot
from pipeline.routing.routes import LayerRoute, PromptRoute, Route

_logger = logging.getLogger(__name__)


class ExpertMemory(Protocol):
    """The experts of a pool beside the Linears of a model."""

    loaded: PoolExperts
    """What is in memory for all calls."""

    def of(self, route: Route) -> PoolExperts:
        """Returns the experts of a call that is routed like this, where the base is now; they stay as long as it is held."""
        ...


def memory_for(
    pool: Pool, linears: Mapping[str, nn.Linear], modules: Sequence[str], limit: int | None = None
) -> ExpertMemory:
    """Puts a pool's experts beside the Linears that it adapts: all of them, or those in use within `limit` bytes.

    `modules` are the names of all of the model's modules, in order. Where the Linears choose from all experts (router kind
    `token`), all of them are in memory, whatever the limit.
    """
    experts, observed = list(pool.experts.values()), _classifiers(pool, linears, modules)
    sizes = _Sizes.of(experts, linears)
    pages = len(experts) if limit is None else limit // max(1, sizes.bytes)
    if pages < len(experts) and pool.router.kind == "token":
        _logger.warning(
            "evaluation.expert_memory is not kept: with router.kind `token` every Linear chooses from all %d experts, which "
            "take %d bytes; router.kind `prompt` or `two_level` reads those that a batch is routed to",
            len(experts),
            sizes.bytes * len(experts),
        )
        pages = len(experts)
    if pages >= len(experts):
        return AllExperts(linears, {path: _stacked(path, linears[path], experts, observed) for path in linears})
    if pages == 0:
        _logger.warning(
            "evaluation.expert_memory is %d bytes, less than one expert takes (%d); one is kept", limit, sizes.bytes
        )
    return PagedExperts(experts, linears, observed, sizes, max(1, pages))


class AllExperts:
    """All experts of a pool."""

    def __init__(self, linears: Mapping[str, nn.Linear], by_path: dict[str, LinearExperts]) -> None:
        self.loaded = PoolExperts(by_path)
        self._linears = dict(linears)
        self._lock = threading.Lock()

    def of(self, route: Route) -> PoolExperts:
        """Returns all of them."""
        with self._lock:
            _follow(self.loaded, self._linears)
        return self.loaded


class PagedExperts:
    """As many experts of a pool as there are places for."""

    def __init__(
        self,
        experts: Sequence[Expert],
        linears: Mapping[str, nn.Linear],
        observed: Mapping[str, LayerClassifier],
        sizes: "_Sizes",
        pages: int,
    ) -> None:
        self._experts, self._linears, self._sizes, self._count = list(experts), dict(linears), sizes, pages
        with torch.inference_mode(False):  # what is written to later must not be of a mode that forbids it
            self.loaded = PoolExperts({path: self._room(path, observed.get(path)) for path in linears})
        self._pages: dict[int, int] = {}
        """Place of each expert that has one, the one that was used last at the end."""
        self._free_pages = list(range(pages))
        self._held: Counter[int] = Counter()
        """How many calls hold each place."""
        self._released: deque[Sequence[int]] = deque()
        """Places of calls that are gone. They are collected at any moment, in any thread, so that no lock may be taken then."""
        self._lock = threading.Lock()
        self._warned = False

    def of(self, route: Route) -> PoolExperts:
        """Returns the experts that a route lists, read into memory where they are not there."""
        needed = _routed_experts(route)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            _follow(self.loaded, self._linears)
            while self._released:
                self._held.subtract(self._released.popleft())
            pages = self._take(needed)
            if pages is None:
                return self._apart(needed)
            routed_experts = PoolExperts(self._at(dict(zip(needed, pages, strict=True))), self.loaded)
            weakref.finalize(routed_experts, self._released.append, pages).atexit = False
            self._held.update(pages)
            return routed_experts

    def _room(self, path: str, classifier: LayerClassifier | None) -> LinearExperts:
        rank = self._sizes.ranks[path]
        return LinearExperts.room(self._linears[path], self._count * rank, rank, len(self._experts), classifier)

    def _take(self, needed: Sequence[int]) -> list[int] | None:
        """Returns the page of each expert, read if need be; None if too few pages are free."""
        missing = [expert for expert in needed if expert not in self._pages]
        idle = deque(e for e, page in self._pages.items() if not self._held[page] and e not in needed)
        if len(missing) > len(self._free_pages) + len(idle):
            return None
        for expert in missing:
            page = self._free_pages.pop() if self._free_pages else self._pages.pop(idle.popleft())
            self._free_pages.append(page)  # should reading fail
            self._read(expert, page)
            self._pages[expert] = self._free_pages.pop()
        for expert in needed:
            self._pages[expert] = self._pages.pop(expert)
        return [self._pages[expert] for expert in needed]

    def _read(self, expert: int, page: int) -> None:
        """Reads an expert's weights into a place."""
        for path, adapter in self._experts[expert].adapters.items():
            here, first = self.loaded.by_path[path], page * self._sizes.ranks[path]
            rows = slice(first, first + len(adapter.a_RD))
            here.down_SD[rows].copy_(adapter.a_RD.float())
            here.up_SO[rows].copy_(adapter.scaling * adapter.b_OR.float().T)

    def _at(self, pages: Mapping[int, int]) -> dict[str, LinearExperts]:
        """Returns the experts at these places; Linears in which they have the same ranks share what says where."""
        rows_by_layout: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = {}
        routed_experts = {}
        for path, here in self.loaded.by_path.items():
            rank, ranks = self._sizes.ranks[path], tuple(self._sizes.of_expert(expert, path) for expert in pages)
            layout = rank, ranks, here.rows_ER.device
            if layout not in rows_by_layout:
                rows_ER = torch.full(here.rows_ER.shape, self._count * rank)
                for (expert, page), ranks_of_expert in zip(pages.items(), ranks, strict=True):
                    rows_ER[expert, :ranks_of_expert] = torch.arange(ranks_of_expert) + page * rank
                rows_by_layout[layout] = rows_ER.to(here.rows_ER.device)
            routed_experts[path] = replace(here, rows_ER=rows_by_layout[layout])
        return routed_experts

    def _apart(self, needed: Sequence[int]) -> PoolExperts:
        """Returns weights of a call's own."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "evaluation.expert_memory: running batches need more experts at once than the %d that it holds (one needs %d); "
                "weights beyond the limit are read for as long as a batch takes. Raise it, or lower evaluation.batch_size",
                self._count,
                len(needed),
            )
        by_path = {}
        for path, linear in self._linears.items():
            experts, classifier = [(i, self._experts[i]) for i in needed], self.loaded.by_path[path].classifier
            slots = _slots(path, experts)
            by_path[path] = LinearExperts.stacked(
                linear, slots, len(self._experts), classifier, height=self._sizes.ranks[path]
            )
        return PoolExperts(by_path, self.loaded)


@dataclass(frozen=True)
class _Sizes:
    """How large experts are, from the headers of their files."""

    experts: Sequence[Mapping[str, int]]
    """Rank of each expert at each Linear that it adapts."""
    ranks: Mapping[str, int]
    """Largest rank at each Linear."""
    bytes: int
    """What the largest ranks take at all Linears together, on the Linears' devices."""

    @classmethod
    def of(cls, experts: Sequence[Expert], linears: Mapping[str, nn.Linear]) -> "_Sizes":
        ranks_of_expert = [ranks_of(expert.adapters) for expert in experts]
        ranks = {path: max((ranks.get(path, 0) for ranks in ranks_of_expert), default=0) for path in linears}
        widths = {path: (n.in_features + n.out_features) * n.weight.element_size() for path, n in linears.items()}
        return cls(ranks_of_expert, ranks, sum(ranks[path] * width for path, width in widths.items()))

    def of_expert(self, expert: int, path: str) -> int:
        return self.experts[expert].get(path, 0)


def _routed_experts(route: Route) -> list[int]:
    """Returns the experts that a route lists; none where the base answers."""
    match route:
        case PromptRoute(experts_BM=listed) | LayerRoute(experts_BM=listed):
            return [expert for expert in listed.unique().tolist() if expert >= 0]
    return []


def _follow(experts: PoolExperts, linears: Mapping[str, nn.Linear]) -> None:
    """Brings experts to where the base is now, if it was moved since."""
    with torch.inference_mode(False):
        for path, here in experts.by_path.items():
            experts.by_path[path] = here.beside(linears[path])


def _slots(path: str, experts: Sequence[tuple[int, Expert]]) -> list[Slot]:
    """Returns the parts of experts, given with their places in the pool, in one Linear."""
    return [
        Slot(i, a.a_RD, a.b_OR, a.scaling, expert.vectors.get(path, torch.zeros(a.a_RD.shape[1])))
        for i, expert in experts
        if (a := expert.adapters.get(path)) is not None
    ]


def _stacked(
    path: str, linear: nn.Linear, experts: Sequence[Expert], observed: Mapping[str, LayerClassifier]
) -> LinearExperts:
    return LinearExperts.stacked(linear, _slots(path, list(enumerate(experts))), len(experts), observed.get(path))


def _classifiers(pool: Pool, linears: Mapping[str, nn.Linear], modules: Sequence[str]) -> dict[str, LayerClassifier]:
    """Solves the classifiers of the Linears, if the pool's router uses them."""
    settings = pool.router
    if settings.kind == "prompt" or (settings.kind == "token" and settings.token_scores == "phatgoose"):
        return {}
    return layer_classifiers(
        list(linears),
        [expert.layer_statistics for expert in pool.experts.values()],
        pool.null_layer_statistics,
        {path: linear.in_features for path, linear in linears.items()},
        order=modules,
        shrinkage=settings.shrinkage,
    )
