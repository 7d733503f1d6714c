"""What the registry holds: lists of models, one version in full, two versions side by side. Reads only."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from pipeline.registry.names import Kind, read_name
from pipeline.registry.promotion import CHAMPION
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, scores_of
from pipeline.registry.versions import MODELS, NEWEST, PAGE, get_version, logged_model, number, version_at

POOL_CARD_PATH = "artifacts/pool/pool.json"
"""Where a pool's card lies among a version's artifacts."""


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
    tags: dict[str, str]
    """Tags of the newest version."""


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
        in_use = model.aliases.get(CHAMPION)
        champion = None if in_use is None else int(in_use)
        found.append(Listed(model.name, *named, latest=number(newest), champion=champion, tags=dict(newest.tags)))
    order = ["pool", "expert", "base"]
    return sorted(found, key=lambda each: (order.index(each.kind), each.model))


def _models() -> Iterator[RegisteredModel]:
    client, token = MlflowClient(), None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def meant(address: str) -> ModelVersion:
    """Returns the version that a user means: `models:/NAME/3`, `NAME/3`, `NAME@champion`, or `NAME`: its champion or newest.

    Raises RegistryError that lists what there is.
    """
    wanted = address.removeprefix(MODELS)
    if "/" in wanted or "@" in wanted:
        return version_at(MODELS + wanted)
    models = MlflowClient().search_registered_models(f"name = '{wanted}'")
    if not models:
        names = [model.name for model in _models() if read_name(model.name)]
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise RegistryError(f"no model {wanted!r} in the registry; there are {shown or 'none'}")
    return get_version(wanted, str(models[0].aliases.get(CHAMPION, NEWEST)))


def shown(version: ModelVersion) -> Shown:
    """Returns all that the registry says of a version."""
    model = logged_model(version)
    named = read_name(version.name)
    experts = experts_of(version) if named and named.kind == "pool" else {}
    return Shown(
        version.name,
        number(version),
        sorted(version.aliases),
        dict(version.tags),
        version.description or "",
        scores_of(version),
        dict(sorted(model.params.items())),
        experts,
        version.run_id,
    )


def difference(before: ModelVersion, after: ModelVersion) -> Difference:
    """Compares two versions of pools: accuracies by data set, and which experts came, went or were replaced.

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
    return Difference(
        f"{before.name}/{before.version}",
        f"{after.name}/{after.version}",
        rows,
        incomparable,
        added=[name for name in new if name not in old],
        removed=[name for name in old if name not in new],
        replaced={name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]},
    )


def _accuracy(score: Score | None) -> float | None:
    return None if score is None else score.accuracy


def experts_of(version: ModelVersion) -> dict[str, str]:
    """Returns the experts of a pool's version by name, as `<model>/<version>`; those that it holds itself as `in the pool`."""
    location = logged_model(version).artifact_location
    text = mlflow.artifacts.load_text(f"{location}/{POOL_CARD_PATH}")
    # Read as it is: to check it as a pool does would take torch.
    references = [{"name": r} if isinstance(r, str) else r for r in json.loads(text)["experts"]]
    return {r["name"]: f"{r['model']}/{r['version']}" if r.get("model") else "in the pool" for r in references}
