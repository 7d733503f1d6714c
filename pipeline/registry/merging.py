"""Changes to one pool by several people at the same time: none of them is lost.

A version is a change of the one that it was made of: an expert came, another took its place, or one was retired. Who registers
a version while others register theirs has not seen their changes; they are found afterwards, by number, and made once more on
top, in a further version. Nothing is locked for that and nothing deleted, so it works on a server, and after a kill.
"""

from collections.abc import Mapping
from contextlib import suppress

from mlflow.entities.model_registry import ModelVersion

from pipeline.registry.contents import Place, places_of
from pipeline.registry.experts import reference_to
from pipeline.registry.pools import MADE_OF
from pipeline.registry.retries import RegistryError
from pipeline.registry.successors import continuations, open_pool, register_successor
from pipeline.registry.versions import get_version, logged_model, number, version_at
from pipeline.routing.store import ExpertStore, StoredExpert


def unseen_changes(version: ModelVersion, start: ModelVersion) -> dict[str, Place]:
    """Returns what others have changed that `version` has not seen, by task: on its way from `start` to it.

    A task that its own line has changed since is left as it is.
    """
    mine = places_of(version)
    others = sorted((v for v in continuations(start) if number(v) < number(version)), key=number)
    unseen: dict[str, Place] = {}
    step, before = version, _made_of(version)
    while before is not None and number(before) >= number(start):
        then = places_of(step)
        changed: dict[str, Place] = {}
        for other in others:
            if number(before) < number(other) < number(step):
                changed |= _change(other)
        for name, place in changed.items():
            if then.get(name) != place and mine.get(name) == then.get(name):
                unseen.setdefault(name, place)
        step, before = before, _made_of(before)
    return unseen


def _made_of(version: ModelVersion) -> ModelVersion | None:
    """Returns the version of which this one is a change; None where a stream has learned it, or that one was deleted."""
    parent = logged_model(version).params.get(MADE_OF)
    with suppress(RegistryError):
        return None if parent is None else get_version(version.name, parent)
    return None


def _change(version: ModelVersion) -> dict[str, Place]:
    """Returns what a version has changed in the one that it was made of; nothing for one that a stream has learned."""
    before = _made_of(version)
    if before is None:
        return {}
    was = places_of(before)
    return {name: place for name, place in places_of(version).items() if was.get(name) != place}


def merged(version: ModelVersion, start: ModelVersion, store: ExpertStore, *, own: str) -> ModelVersion:
    """Returns the version, or a further one with what others have changed meanwhile but for task `own`; needs an open run."""
    while unseen := {n: place for n, place in unseen_changes(version, start).items() if n != own}:
        version = _with_changes(version, unseen, store)
    return version


def _with_changes(version: ModelVersion, changes: Mapping[str, Place], store: ExpertStore) -> ModelVersion:
    """Registers the successor of a version that has these changes too."""
    opened = open_pool(version, store)
    pool, experts = opened.pool, []
    for name, (address, retired) in changes.items():
        expert = version_at(address)
        pool = pool.add(StoredExpert(reference_to(name, expert), store))
        pool = pool.retire(name) if retired else pool
        experts.append(expert)
    change = ["merged", *(f"{name} {place.address} {place.retired}" for name, place in sorted(changes.items()))]
    return register_successor(opened, pool, change, experts=experts)
