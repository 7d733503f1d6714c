"""A base with a pool attached: `generate` and `forward` as before, routed inside.

The base's Linears are wrapped, not changed: `detach` puts the very same modules back, `load` puts another pool in their
place. The decision is taken at prefill, from what the language model is about to read, and holds while the answer is
generated (with KV cache, which carries it along). Shapes: B rows, T tokens, D width, E experts, F features.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.call import Call, Decision, Routers
from pipeline.routing.features import project_prompts
from pipeline.routing.memory import memory_for
from pipeline.routing.pool import Pool, PoolError
from pipeline.routing.prompt_hooks import PromptFeatureHook
from pipeline.routing.prompt_router import prompt_route
from pipeline.routing.routed_linear import Current, PoolExperts, RoutedLinear, Running
from pipeline.routing.routes import NULL_EXPERT, BaseOnly, Route


@dataclass(frozen=True)
class Here:
    """What one thread or asynchronous task has asked of a routed model, and got."""

    forced: tuple[str | None] | None = None
    """The expert that answers everything (None: the base); None: the router decides."""
    call: Call | None = None
    """The call that is open."""
    last: Call = field(default_factory=Call)


_HERE: ContextVar[Mapping[weakref.ref["RoutedModel"], Here]] = ContextVar("routed models")


class RoutedModel:
    """A pool attached to a base.

    Any number of threads and tasks may generate at once: what is decided for a call hangs on its KV cache, and what a
    caller asks for (`call`, `forced`) and gets (`decisions`) is the caller's own.

    `expert_memory` bounds the bytes of experts' weights on the model's devices, all together (see `memory`); None: all experts
    of the pool are there.
    """

    def __init__(self, model: Any, pool: Pool, *, expert_memory: int | None = None) -> None:
        self.model, self.expert_memory = model, expert_memory
        self.current = Current([])
        self._replaced: dict[str, nn.Linear] = {}
        self._versions: weakref.WeakSet[PoolExperts] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._routers: Routers | None = None
        self._key = weakref.ref(self)
        self.load(pool)
        self._reader = PromptFeatureHook(model, self._decide)
        self._end_hook = model.register_forward_hook(self._end)

    def load(self, pool: Pool) -> None:
        """Routes by `pool` from now on; the model, its hooks and its caches stay as they are.

        Calls that have begun in other threads end with the pool that they began with, whose experts stay in memory until
        then. Raises PoolError, with nothing changed, where the pool adapts something that is not a Linear in memory, or
        lacks the expert that is forced at the moment.
        """
        forced = self._here.forced
        if forced is not None and forced[0] not in (None, *pool.experts):
            raise PoolError(f"expert {forced[0]!r} is forced at the moment, and the new pool does not have it")
        with self._lock:
            linears = self._linears(pool)
            memory = memory_for(pool, linears, [name for name, _ in self.model.named_modules()], self.expert_memory)
            for path, linear in linears.items():
                if path not in self._replaced:
                    self._replaced[path] = linear
                    self.model.set_submodule(path, RoutedLinear(linear, self.current, path))
            self._routers = Routers(pool, self._routers)
            self._loaded = self._routers, memory
            self._versions.add(memory.loaded)
            self._note(last=Call())
            self.current.recorded.clear()  # a backward pass that is due no more would keep the pool before
            self.current.running = None
            needed = {path for version in self._versions for path in version.by_path}
            for path in self._replaced.keys() - needed:
                self.model.set_submodule(path, self._replaced.pop(path))

    def _linears(self, pool: Pool) -> dict[str, nn.Linear]:
        """Returns the Linears that a pool adapts, in the model's order."""
        adapted = {path for expert in pool.experts.values() for path in expert.adapters}
        linears = {path: self._replaced.get(path) or self.model.get_submodule(path) for path in adapted}
        for path, linear in linears.items():
            if not isinstance(linear, nn.Linear):
                raise PoolError(f"{path} is {type(linear).__name__}, not a Linear; is another pool still attached?")
            if linear.weight.is_meta:
                raise PoolError(
                    f"{path} is not in memory (its weight is on the meta device: offloaded, or never loaded), so no "
                    "expert can stand beside it; load the base onto devices that hold all of it, e.g. onto more GPUs, "
                    "or in a smaller base.dtype"
                )
        return {path: linears[path] for path, _ in self.model.named_modules() if path in adapted}

    @torch.no_grad()
    def _decide(self, features_BS: Tensor | None, tokens_BT: Tensor | None) -> None:
        """Begins a call at prefill; finds it again while decoding (features None)."""
        cache = self._reader.cache
        if features_BS is None:
            running = getattr(cache, "running", None)
            if running is None or running.owner is not self.current:
                raise PoolError(
                    "this KV cache holds a prompt that was not read with this pool attached, so nobody has decided who "
                    "answers it; read the prompt again with an empty cache"
                )
            running.state.decode()
            self.current.running = running
            return
        (routers, memory), here = self._loaded, self._here
        width = routers.pool.width or features_BS.shape[-1]
        features_BF = project_prompts(features_BS, width)
        route = self._route(routers, here.forced, features_BF)
        call = here.call or Call()
        experts = memory.of(route)
        call.begin(routers, tuple(experts.by_path), features_BF, route, tokens_BT, keep=here.call is not None)
        self._note(last=call)
        self.current.running = running = Running(call.state, experts, self.current)
        if cache is not None:
            cache.running = running

    def _route(self, routers: Routers, forced: tuple[str | None] | None, features_BF: Tensor) -> Route:
        pool = routers.pool
        if forced is not None:
            (name,) = forced
            if name is not None and name not in pool.experts:
                raise PoolError(f"expert {name!r} is forced, and the pool that was loaded since does not have it")
            expert = NULL_EXPERT if name is None else pool.names.index(name)
            return prompt_route(torch.full((1, 1), expert), torch.ones(1, 1), features_BF.device)
        return routers.router.route(features_BF) if pool.experts else BaseOnly()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends a forward pass: a KV cache that the model made itself takes the call along."""
        running = self.current.running
        if running is not None and not running.state.decoding:
            cache = getattr(output, "past_key_values", None)
            if isinstance(output, tuple):
                cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
            if cache is not None:
                cache.running = running
        if running is not None and torch.is_grad_enabled():
            self.current.recorded[:] = [running]
        self.current.running = None

    @property
    def pool(self) -> Pool:
        """The pool by which new calls are routed."""
        return self._loaded[0].pool

    @property
    def paths(self) -> list[str]:
        """Paths of the Linears that the pool adapts, in the model's order."""
        return list(self._loaded[1].loaded.by_path)

    @property
    def last(self) -> Call:
        """The last call of this thread or task; one without rows before the first, and after `load`."""
        return self._here.last

    @property
    def decisions(self) -> list[Decision]:
        """Who answered each row of this thread's or task's last batch; empty before the first."""
        return self.last.decisions

    @contextmanager
    def call(self, *, traced: bool = False) -> Iterator[Call]:
        """Gives the caller the call that its prompts begin while the context lasts; its decisions stay readable afterwards.

        The call holds its pool as long as the context lasts. `traced`: it keeps the weight of each expert at each token of
        the prompt. Where several batches are read, the call is the last one's.
        """
        call, before = Call(traced=traced), self._here.call
        self._note(call=call)
        try:
            yield call
        finally:
            self._note(call=before)
            call.end()

    @contextmanager
    def forced(self, name: str | None) -> Iterator[None]:
        """Sends the caller's prompts to expert `name` (None: to the base) while the context lasts."""
        if name is not None and name not in self.pool.experts:
            raise PoolError(f"no expert {name!r} in the pool; there are: {', '.join(self.pool.names) or 'none'}")
        before = self._here.forced
        self._note(forced=(name,))
        try:
            yield
        finally:
            self._note(forced=before)

    @property
    def _here(self) -> Here:
        return _HERE.get({}).get(self._key) or Here()

    def _note(self, **changes: Any) -> None:
        by_model = {key: here for key, here in _HERE.get({}).items() if key() is not None}
        _HERE.set(by_model | {self._key: replace(self._here, **changes)})

    def detach(self) -> None:
        """Gives the base back exactly as it was; no call may be on its way."""
        self._reader.remove()
        self._end_hook.remove()
        with self._lock:
            for path, linear in self._replaced.items():
                self.model.set_submodule(path, linear)
            self._replaced.clear()
            self.current.recorded.clear()
