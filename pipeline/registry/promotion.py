"""Promotion: which version of a pool is its `champion`, the one in use.

A new version is MLflow's `latest` at once. It becomes champion by decision: `promote`, or the gate (`reason_against`), which
compares it with the champion. Tag `champions` of the registered model lists them as they came, so that `rollback` is one
step; it is written before the alias moves, and what follows the champion in it is a promotion that was cut off.
"""

from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, base_kept
from pipeline.registry.versions import get_version, number

CHAMPION = "champion"
"""Alias of the pool version in use."""

CHAMPIONS = "champions"
"""Tag of a registered model: numbers of its champions, the newest last."""

REMEMBERED = 20
"""Most champions in the tag."""

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


def promote(name: str, version: int | str) -> ModelVersion:
    """Makes a version, newer or older, the champion.

    Raises RegistryError if there is no such version.
    """
    chosen, (in_use, numbers) = get_version(name, version), _champions(name)
    if in_use != number(chosen):
        client, numbers = MlflowClient(), [*numbers, number(chosen)][-REMEMBERED:]
        client.set_registered_model_tag(name, CHAMPIONS, ",".join(map(str, numbers)))
        client.set_registered_model_alias(name, CHAMPION, str(chosen.version))
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
