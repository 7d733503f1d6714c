"""A pool's version made of another one, from the registry alone: an expert comes, takes another's place, or is retired.

The statistics of base prompts, the base and how it is loaded stay those of the version before; no data are needed.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlflow.entities.model_registry import ModelVersion

from pipeline.config import digest
from pipeline.registry.bases import find_base
from pipeline.registry.claims import take_up
from pipeline.registry.contents import experts_of, places_of
from pipeline.registry.evaluated_prompts import EvaluatedPrompts, kept_prompts
from pipeline.registry.experts import reference_to, registered_experts
from pipeline.registry.loading import fetched_pool
from pipeline.registry.migration import FORMER_DIGEST
from pipeline.registry.names import base_name, read_name
from pipeline.registry.pools import create_pool_version, find_pool, served_settings
from pipeline.registry.promotion import PROMOTED, REFUSED, champion
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, log_scores, scores_of
from pipeline.registry.strays import keep_strays, strays_of
from pipeline.registry.tracking import active_run
from pipeline.registry.versions import (
    DIGEST,
    MODELS,
    get_version,
    log_lineage,
    logged_model,
    logged_model_id,
    number,
    versions_of,
)
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference, ExpertStore, StoredExpert

REQUESTS = 16
"""Requests to the registry at the same time, where each of many experts is asked for."""


class Evaluated(NamedTuple):
    """What an expert, or the base, was evaluated on."""

    score: Score
    prompts: EvaluatedPrompts


@dataclass(frozen=True)
class Registered:
    """A pool's version with what its successors take over."""

    version: ModelVersion
    pool: Pool
    name: str
    """Name of the pool."""
    digest: str
    served: dict[str, Any]
    """How its base is loaded (`model_config` of MLflow)."""
    base_version: str
    """Version of its base in the registry."""

    @property
    def references(self) -> dict[str, ExpertReference]:
        """References to its experts by name."""
        return {reference.name: reference for reference in self.pool.card.experts}

    @property
    def in_use(self) -> dict[str, ExpertReference]:
        """References to its experts that are not retired, by name."""
        return {name: r for name, r in self.references.items() if name not in self.pool.retired}

    def evaluated_on(self, *others: ModelVersion) -> dict[str, Evaluated]:
        """Returns what its experts, and its base, are evaluated on by task and base ability, as far as the registry keeps it.

        Its own scores name the evaluation prompts, else those of `others`, else those of the expert alone.
        """
        known = {score.dataset: score for version in (*others, self.version) for score in scores_of(version)}
        base = base_of(self.version)

        def of_expert(reference: ExpertReference) -> Evaluated | None:
            with suppress(RegistryError):  # a version that was deleted: its expert may be there under another one
                version = get_version(reference.model or "", reference.version or 0)
                alone = [score for score in scores_of(version) if score.dataset == reference.name]
                return _first_kept(version, [*([known[reference.name]] if reference.name in known else []), *alone])
            return None

        with ThreadPoolExecutor(REQUESTS) as pool:
            of_base = {s.dataset: pool.submit(_first_kept, base, [s]) for s in known.values() if s.ability}
            of_task = {name: pool.submit(of_expert, reference) for name, reference in self.in_use.items()}
            found = {name: asked.result() for name, asked in (of_base | of_task).items()}
            return {name: evaluated for name, evaluated in found.items() if evaluated is not None}


def _first_kept(version: ModelVersion, scores: Sequence[Score]) -> Evaluated | None:
    found = ((score, kept_prompts(version, score.digest)) for score in scores)
    return next((Evaluated(score, prompts) for score, prompts in found if prompts is not None), None)


def base_of(version: ModelVersion) -> ModelVersion:
    """Returns the registered base of a pool's version; one of an earlier release is found by its fingerprint."""
    params, named = logged_model(version).params, read_name(version.name)
    if "base" in params:
        return get_version(base_name(params["base"]), params["base_version"])
    assert named is not None, "callers have opened it"
    return find_base(named.base, params["base_fingerprint"])


def open_pool(version: ModelVersion, store: ExpertStore | None = None) -> Registered:
    """Reads a pool's version; its experts are read from `store` (default: the user's cache) when they are looked up.

    Raises RegistryError for another model, and for a pool of an earlier release that holds its experts itself.
    """
    named, model, address = read_name(version.name), logged_model(version), f"{version.name}/{version.version}"
    if named is None or named.kind != "pool" or DIGEST not in model.params:
        former = FORMER_DIGEST in version.tags
        raise RegistryError(
            f"{address} is of an earlier release: `pointsman registry migrate` gives it a name by which it can be used"
            if former
            else f"{address} is no pool of this project"
        )
    pool = fetched_pool(f"{MODELS}{address}", store)
    if own := [reference.name for reference in pool.card.experts if reference.version is None]:
        raise RegistryError(
            f"{address} holds {own[0]} itself, as earlier releases wrote it: run its `pointsman learn` again, which "
            "registers it anew"
        )
    base_version = model.params["base_version"] if "base" in model.params else str(base_of(version).version)
    return Registered(version, pool, named.name, model.params[DIGEST], served_settings(version), base_version)


def register_successor(
    before: Registered,
    pool: Pool,
    change: Sequence[str],
    *,
    experts: Sequence[ModelVersion] = (),
    scores: Sequence[Score] = (),
) -> ModelVersion:
    """Registers `pool` as the successor of a version; needs an open run. No alias moves.

    `change` names what makes it differ: of the same version and the same change there is one successor, and that is returned.
    `experts` are the versions of those that are new in it. Raises RegistryError where one of them is being deleted.
    """
    name = digest(before.digest, *change)
    if (made := find_pool(pool.base_label, before.name, name)) is not None:
        return made
    references = {reference.name: reference for reference in pool.card.experts}
    for version in experts:
        named = read_name(version.name)
        assert named is not None, "callers pass versions of experts"
        if not take_up(logged_model_id(version)):
            raise RegistryError(
                f"{version.name}/{version.version} has just been deleted as what no pool needed (`pointsman registry gc`); "
                "register it anew (the `pointsman learn` or `pointsman add` that trained it), or choose another version"
            )
        references[named.name] = reference_to(named.name, version)
    log_lineage(active_run().info.run_id, experts)
    return create_pool_version(
        pool,
        before.name,
        name,
        references,
        before.served,
        before.base_version,
        scores,
        made_of=number(before.version),
    )


def check_retires(version: ModelVersion, expert: str) -> None:
    """Raises RegistryError where a pool's version has no such expert, or it is retired already."""
    places, what = places_of(version), f"{version.name}/{version.version}"
    if expert not in places:
        raise RegistryError(f"{what} has no expert {expert!r}; there are: {', '.join(places) or 'none'}")
    if places[expert].retired:
        raise RegistryError(f"{what}: expert {expert!r} is retired already")


def retire_expert(version: ModelVersion, expert: str) -> ModelVersion:
    """Makes a version of the same pool in which the base answers in place of `expert`; needs an open run.

    Who answers other prompts stays as it is (`Pool.retire`). If there is such a version, it is returned. Raises PoolError for
    an expert that the pool lacks, RegistryError as `open_pool` does.
    """
    before = open_pool(version)
    kept = [score for score in scores_of(version) if score.dataset != expert]
    made = register_successor(before, before.pool.retire(expert), ["retired", expert], scores=kept)
    log_scores(active_run().info.run_id, made, kept)
    strays = strays_of(version)
    if strays is not None and strays_of(made) is None:
        keep_strays(made, {name: of.retiring(expert) for name, of in strays.items()})
    return made


def replacement(before: Registered, version: ModelVersion) -> Pool:
    """Returns the pool with this version of an expert in the place of that which it holds.

    Raises RegistryError where the version is no expert over the pool's base, the pool has none of its task, or holds it
    already; PoolError where it does not fit.
    """
    named, address = read_name(version.name), f"{version.name}/{version.version}"
    label, pool = before.pool.base_label, f"{before.version.name}/{before.version.version}"
    if named is None or named.kind != "expert" or named.base != label:
        raise RegistryError(f"{address} is no expert over base {label!r}; those are called {label}.expert.<task>")
    if named.name not in before.pool.names:
        raise RegistryError(
            f"{pool} has no expert {named.name!r} whose place {address} could take; there are: "
            f"{', '.join(before.pool.names) or 'none'}"
        )
    reference = reference_to(named.name, version)
    if reference.digest == before.references[named.name].digest and named.name not in before.pool.retired:
        raise RegistryError(f"{pool} holds {address} already")
    return before.pool.add(StoredExpert(reference, registered_experts()))


def refused_between(before: ModelVersion, after: ModelVersion) -> dict[int, str]:
    """Returns what the gate has refused between two versions of a pool, and why: status by number."""
    found = {number(v): v.tags.get("status", "") for v in versions_of(after.name)}
    return {
        n: status
        for n, status in sorted(found.items())
        if number(before) < n < number(after) and status.startswith(REFUSED)
    }


def newest_with(version: ModelVersion) -> ModelVersion:
    """Returns the newest version of a pool that goes on from `version`, or that itself."""
    return next(continuations(version), version)


def continuations(version: ModelVersion) -> Iterator[ModelVersion]:
    """Yields the versions that go on from `version`, the newest first.

    They have experts of all of its tasks; the gate has not refused them, and nobody has rolled back from them: what others
    have added is not to be lost, but what nobody wants is not to be built upon.
    """
    tasks, in_use = experts_of(version).keys(), champion(version.name)
    for newer in versions_of(version.name):
        if number(newer) <= number(version):
            return
        status = newer.tags.get("status", "")
        rolled_back = in_use is not None and number(newer) > number(in_use) and status.startswith(PROMOTED)
        if rolled_back or status.startswith(REFUSED):
            continue
        with suppress(RegistryError):  # damaged
            if experts_of(newer).keys() >= tasks:
                yield newer
