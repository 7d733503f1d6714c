"""Promotion: which version of a pool is its `champion`, the one in use.

A new version is MLflow's `latest` at once. It becomes champion by decision: `promote`, or the gate (`reason_against`), which
compares it with the champion. Tag `champions` of the registered model lists them as they came, so that `rollback` is one
step; it is written before the alias moves, and what follows the champion in it is a promotion that was cut off.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.locks import file_lock
from pipeline.registry.addresses import database_path
from pipeline.registry.base_prompts import BASE_PROMPTS, base_prompts_damage
from pipeline.registry.contents import POOL_FOLDER, contains, experts_of, places_of
from pipeline.registry.databases import database_lock, is_database
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, base_kept, scores_of
from pipeline.registry.versions import (
    FILES,
    all_logged_models,
    all_versions,
    damage,
    describe,
    get_version,
    is_ours,
    logged_model,
    logged_model_id,
    number,
)

CHAMPION = "champion"
"""Alias of the pool version in use."""

CHAMPIONS = "champions"
"""Tag of a registered model: numbers of its champions, the newest last."""

PROMOTED, REFUSED = "promoted", "refused"
"""Begin of the status of a version that became champion, or that the gate has refused; date, or reason, follows."""

REMEMBERED = 20
"""Most champions in the tag."""

EXPERT_FILES = ("expert.json", "adapter_model.safetensors")
"""What every expert has, also of earlier releases."""

KEPT = 0.99
"""Least share of the base's accuracy on the base abilities that a champion keeps."""


def champion(name: str) -> ModelVersion | None:
    """Returns the champion of a pool's registered model; None if it has none."""
    in_use, _ = _champions(name)
    return None if in_use is None else get_version(name, in_use)


def _champions(name: str) -> tuple[int | None, list[int]]:
    """Returns the number of the champion, and those of all champions up to it."""
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    if not models or CHAMPION not in models[0].aliases:
        return None, []
    in_use, known = int(models[0].aliases[CHAMPION]), models[0].tags.get(CHAMPIONS, "")
    numbers = [int(part) for part in known.split(",") if part.strip().isdigit()]
    if in_use not in numbers:  # MLflow's own pages can move the alias too
        return in_use, [*numbers, in_use]
    return in_use, numbers[: len(numbers) - numbers[::-1].index(in_use)]


def reason_against(candidate: Sequence[Score], champion: Sequence[Score], *, tolerance: float) -> str | None:
    """Returns why a pool must not take the place of the champion, None if it may.

    It may if it has every task of the champion, none of which drops by more than `tolerance` (a difference of accuracies), and
    if it keeps `KEPT` of the base's accuracy on the base abilities. Scores on other evaluation prompts cannot be compared.
    """
    kept = base_kept(candidate)
    if kept is not None and kept < KEPT:
        return f"base abilities kept: {kept:.1%}, at least {KEPT:.0%} needed"
    now = {score.dataset: score for score in candidate if not score.ability}
    tasks = [score for score in champion if not score.ability]
    if missing := [score.dataset for score in tasks if score.dataset not in now]:
        return f"lacks {_listed(missing)} of the champion"
    if other := [score.dataset for score in tasks if now[score.dataset].digest != score.digest]:
        return f"other evaluation prompts than the champion's: {_listed(other)}"
    # A hundredth of a percent, so that rounding decides nothing.
    drops = [(s, now[s.dataset]) for s in tasks if s.accuracy - now[s.dataset].accuracy > tolerance + 1e-4]
    if drops:
        before, after = max(drops, key=lambda pair: pair[0].accuracy - pair[1].accuracy)
        more = f" and {len(drops) - 1} more drop" if len(drops) > 1 else ""
        return f"{before.dataset} drops from {before.accuracy:.3f} to {after.accuracy:.3f}{more}"
    return None


@dataclass(frozen=True)
class Verdict:
    """Whether a version became champion, and why not."""

    text: str
    """For its description."""
    reason: str | None = None
    """Why the gate has refused it."""


def decide(version: ModelVersion, scores: Sequence[Score], *, gate: bool, tolerance: float) -> Verdict:
    """Promotes a version that the gate lets pass (see `reason_against`), and notes on it if it does not.

    What has been decided already stays: a version that is champion, was champion, or is a part of the champion. Without a
    `gate`, and where a task or a base ability of the champion was not measured, it is left to `pointsman registry promote`.
    """
    with deciding(version.name):
        now = champion(version.name)
        if now is not None and number(now) == number(version):
            return Verdict("champion")
        status = get_version(version.name, str(version.version)).tags.get("status", "")
        if status.startswith(PROMOTED):
            return Verdict(f"{status}, and no champion any more")  # someone has rolled back
        if now is not None and number(now) > number(version) and contains(now, version):
            return Verdict(f"part of version {now.version}, the champion")  # others have added to it meanwhile
        command = f"`pointsman registry promote {version.name} {version.version}`"
        if not gate:
            return Verdict(f"by hand: {command}")
        before = scores_of(now) if now else []
        unmeasured = _unmeasured(version, scores, before)
        reason = reason_against(scores, [s for s in before if s.dataset not in unmeasured], tolerance=tolerance)
        if reason is None and unmeasured:
            return Verdict(f"by hand, since its accuracy on {_listed(unmeasured)} is not known: {command}")
        if reason is None:
            promote(version.name, str(version.version))
            return Verdict("promoted by the gate" + (f", after version {now.version}" if now else ""))
    describe(version, tags={"status": f"{REFUSED}: {reason}"[:100]})
    return Verdict(f"refused by the gate: {reason}", reason)


def _unmeasured(version: ModelVersion, scores: Sequence[Score], champion: Sequence[Score]) -> list[str]:
    """Returns what the champion was measured on and a version was not: base abilities, and tasks whose experts it uses."""
    measured = {score.dataset for score in scores}
    missing = [score for score in champion if score.dataset not in measured]
    tasks = [score.dataset for score in missing if not score.ability]
    places = places_of(version) if tasks else {}
    in_use = [name for name in tasks if name in places and not places[name].retired]
    return in_use + [score.dataset for score in missing if score.ability]


@contextmanager
def deciding(name: str) -> Iterator[None]:
    """Keeps other processes from deciding about the same pool meanwhile, where the registry is a file or a database.

    On a server, which has no locks, the last decision counts; whoever makes a version of the champion looks again before
    promoting it.
    """
    with _lock(mlflow.get_tracking_uri(), name):
        yield


def _lock(uri: str, name: str) -> AbstractContextManager[None]:
    if is_database(uri):
        return database_lock(uri, name)
    database = database_path(uri)
    return nullcontext() if database is None else file_lock(database.with_name(f"{database.name}.{name}.lock"))


def check_complete(version: ModelVersion) -> None:
    """Raises RegistryError where a pool's version is not ours, or a file of what it names is missing or of a wrong size."""
    what = f"{version.name}/{version.version}"
    if not is_ours(version):
        raise RegistryError(f"{what} was not registered by this project; it has no experts that could be looked at")
    needed = set(experts_of(version).values())
    models = {address.rpartition("/")[0] for address in needed if "/" in address}
    uploads = {
        f"{v.name}/{v.version}": logged_model_id(v)
        for v in (all_versions() if len(models) > 1 else [v for m in models for v in all_versions(f"name = '{m}'")])
        if v.name in models
    }
    if missing := sorted(address for address in needed if "/" in address and address not in uploads):
        raise RegistryError(f"{what} needs {missing[0]}, which is not in the registry; {_again(what)}")
    wanted = {uploads[address]: address for address in needed if address in uploads}
    logged = {wanted[m.model_id]: m for m in all_logged_models() if m.model_id in wanted}

    def damage_of(address: str) -> str | None:
        if address not in logged:
            return "its files are missing"
        sizes = json.loads(logged[address].params.get(FILES, "{}"))  # earlier releases noted none
        return damage(logged[address].artifact_location, sizes, EXPERT_FILES)

    own = logged_model(version)
    folder, sizes = f"{own.artifact_location}/{POOL_FOLDER}", json.loads(own.params.get(FILES, "{}"))
    if found := damage(folder, sizes):
        raise RegistryError(f"{what} is damaged: {found}; {_again(what)}")
    null_digest = own.params.get(BASE_PROMPTS)  # earlier releases kept them in the version
    if null_digest is not None and (found := base_prompts_damage(null_digest)):
        raise RegistryError(f"{what} needs statistics of base prompts, which are damaged: {found}; {_again(what)}")
    with ThreadPoolExecutor(16) as pool:
        for address, found in zip(wanted.values(), pool.map(damage_of, wanted.values()), strict=True):
            if found is not None:
                raise RegistryError(f"{what} needs {address}, which is damaged: {found}; {_again(what)}")


def _again(what: str) -> str:
    return f"bring them back, or run the `pointsman learn` that made {what} again, which registers it anew"


def promote(name: str, version: int | str, *, checked: bool = True) -> ModelVersion:
    """Makes a version, newer or older, the champion.

    Raises RegistryError if there is no such version, or, if it is to be `checked`, if anything that it names is missing.
    """
    chosen, (in_use, numbers) = get_version(name, version), _champions(name)
    if checked:
        check_complete(chosen)
    if in_use != number(chosen):
        client, numbers = MlflowClient(), [*numbers, number(chosen)][-REMEMBERED:]
        client.set_registered_model_tag(name, CHAMPIONS, ",".join(map(str, numbers)))
        client.set_registered_model_alias(name, CHAMPION, str(chosen.version))
        describe(chosen, tags={"status": f"{PROMOTED} {datetime.now(UTC):%Y-%m-%d}"})
    return chosen


def rollback(name: str) -> ModelVersion:
    """Makes the champion before the present one the champion again; a second call takes it back.

    Raises RegistryError if there is none.
    """
    _, numbers = _champions(name)
    if len(numbers) < 2:
        raise RegistryError(
            f"{name} had no other champion before; choose a version: pointsman registry promote {name} VERSION"
        )
    return promote(name, numbers[-2])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
