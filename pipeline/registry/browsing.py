"""What the registry holds: lists of models, one version in full, two versions side by side. Reads only."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from pipeline.registry.contents import experts_of, retired_of
from pipeline.registry.names import Kind, read_name
from pipeline.registry.promotion import CHAMPION
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, scores_of
from pipeline.registry.strays import Moved, moved_prompts, strays_of
from pipeline.registry.versions import (
    MODELS,
    NEWEST,
    PAGE,
    get_version,
    is_ours,
    logged_model,
    number,
    paged,
    version_at,
)

NAMED = 12
"""Most models that are named where one is missing."""


@dataclass(frozen=True)
class Listed:
    """A registered model in a list."""

    model: str
    kind: Kind
    base: str
    name: str
    latest: int
    """Number of its newest version."""
    champion: int | None
    """Number of the version in use; None for experts and bases, and for pools without one."""
    tagged: int
    """Number of the version whose tags follow: of a pool the one in use, else the newest."""
    tags: dict[str, str]


@dataclass(frozen=True)
class Shown:
    """A version in full."""

    model: str
    version: int
    aliases: list[str]
    tags: dict[str, str]
    description: str
    scores: list[Score]
    parameters: dict[str, str]
    """What it was made from, and how."""
    experts: dict[str, str]
    """A pool's experts by name, as `<model>/<version>`."""
    retired: list[str]
    """Those of them in whose place the base answers."""
    damage: str
    """Why it cannot be loaded; empty where it can, as far as its own files tell."""
    run_id: str

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Two versions of pools, side by side."""

    before: str
    after: str
    scores: list[tuple[str, float | None, float | None]]
    """Data set, accuracy before and after; None where a version has none. Those that differ come first."""
    incomparable: list[str]
    """Data sets of which the two have seen other evaluation prompts."""
    added: list[str]
    removed: list[str]
    replaced: dict[str, tuple[str, str]]
    """Experts that both have in other versions: before and after."""
    retired: list[str]
    """Experts that answered before and do not after."""
    restored: list[str]
    """Experts that were retired before and answer after."""
    moved: list[Moved] | None
    """Evaluation prompts that change hands; None where one of the two has not noted who answered them."""

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return asdict(self)


def listed(kind: Kind | None = None, base: str | None = None) -> list[Listed]:
    """Lists pools, experts and bases, in this order and by name; models of other projects are left out."""
    found = []
    for model in _models():
        named = read_name(model.name)
        if named is None or (kind and named.kind != kind) or (base and named.base != base) or not model.latest_versions:
            continue
        newest = max(model.latest_versions, key=number)
        if not is_ours(newest):
            continue
        in_use = model.aliases.get(CHAMPION)
        champion = None if in_use is None else int(in_use)
        tagged = newest if champion in (None, number(newest)) else get_version(model.name, champion)
        latest, tags = number(newest), dict(tagged.tags)
        found.append(Listed(model.name, *named, latest=latest, champion=champion, tagged=number(tagged), tags=tags))
    order = ["pool", "expert", "base"]
    return sorted(found, key=lambda each: (order.index(each.kind), each.model))


def _models() -> Iterator[RegisteredModel]:
    return paged(partial(MlflowClient().search_registered_models, max_results=PAGE))


def meant(address: str) -> ModelVersion:
    """Returns the version that a user means: `models:/NAME/3`, `NAME/3`, `NAME@champion`, or `NAME`: its champion or newest.

    Raises RegistryError that lists what there is.
    """
    wanted = address.removeprefix(MODELS)
    if "/" in wanted or "@" in wanted:
        return version_at(address)
    model = find_model(wanted)
    return get_version(wanted, str(model.aliases.get(CHAMPION, NEWEST)))


def find_model(name: str) -> RegisteredModel:
    """Returns a registered model; raises RegistryError that lists some of those that there are."""
    models = MlflowClient().search_registered_models(f"name = '{name}'") if re.fullmatch(r"[\w.-]+", name) else []
    if not models:
        names = [each.model for each in listed()]
        left = len(names) - NAMED
        more = f" and {left} more: `pointsman registry list` has all" if left > 0 else ""
        raise RegistryError(f"no model {name!r} in the registry; there are {', '.join(names[:NAMED]) or 'none'}{more}")
    return models[0]


def shown(version: ModelVersion) -> Shown:
    """Returns all that the registry says of a version."""
    model = logged_model(version)
    named = read_name(version.name)
    experts, retired, damage = {}, [], ""
    if named and named.kind == "pool":
        try:
            experts, retired = experts_of(version), retired_of(version)
        except RegistryError as error:
            damage = str(error)
    return Shown(
        version.name,
        number(version),
        sorted(version.aliases),
        dict(version.tags),
        version.description or "",
        scores_of(version),
        dict(sorted(model.params.items())),
        experts,
        retired,
        damage,
        version.run_id,
    )


def difference(before: ModelVersion, after: ModelVersion) -> Difference:
    """Compares two versions of pools: accuracies by data set, experts that came, went or were replaced, prompts that change
    hands.

    Raises RegistryError for a version of another kind.
    """
    for version in (before, after):
        named = read_name(version.name)
        if named is None or named.kind != "pool":
            raise RegistryError(
                f"{version.name}/{version.version} is no pool; only pools have accuracies on many tasks"
            )
    first, second = ({score.dataset: score for score in scores_of(version)} for version in (before, after))
    names = list(dict.fromkeys((*first, *second)))
    incomparable = [n for n in names if n in first and n in second and first[n].digest != second[n].digest]
    rows = [(n, _accuracy(first.get(n)), _accuracy(second.get(n))) for n in names]
    rows.sort(key=lambda row: row[1] == row[2])
    old, new = experts_of(before), experts_of(after)
    idle, idle_after = retired_of(before), retired_of(after)
    routed = strays_of(before), strays_of(after)
    return Difference(
        f"{before.name}/{before.version}",
        f"{after.name}/{after.version}",
        rows,
        incomparable,
        added=[name for name in new if name not in old],
        removed=[name for name in old if name not in new],
        replaced={name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]},
        retired=[name for name in idle_after if name not in idle],
        restored=[name for name in idle if name in new and name not in idle_after],
        moved=None if routed[0] is None or routed[1] is None else moved_prompts(routed[0], routed[1]),
    )


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.accuracy
