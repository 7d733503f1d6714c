"""Promotion: which version of a pool is its `champion`, the one in use.

A new version is MLflow's `latest` at once. It becomes champion by decision: `promote`, or `gate`, which compares it with the
champion. `previous` is the champion before, so that `rollback` is one step.
"""

from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, base_kept
from pipeline.registry.versions import get_version, number

CHAMPION, PREVIOUS = "champion", "previous"
"""Aliases of the pool version in use, and of the one that was before it."""

KEPT = 0.99
"""Least share of the base's accuracy on the base abilities that a champion keeps."""


def champion(name: str) -> ModelVersion | None:
    """Returns the champion of a pool's registered model; None if it has none."""
    return _aliased(name, CHAMPION)


def _aliased(name: str, alias: str) -> ModelVersion | None:
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    version = models[0].aliases.get(alias) if models else None
    return None if version is None else get_version(name, str(version))


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
    """Makes a version, newer or older, the champion; the one before it becomes `previous`.

    Raises RegistryError if there is no such version.
    """
    chosen, before = get_version(name, version), champion(name)
    if before is None or number(before) != number(chosen):
        if before is not None:
            MlflowClient().set_registered_model_alias(name, PREVIOUS, str(before.version))
        MlflowClient().set_registered_model_alias(name, CHAMPION, str(chosen.version))
    return chosen


def rollback(name: str) -> ModelVersion:
    """Makes the previous champion the champion again; a second call takes it back. Raises RegistryError if there is none."""
    before, now = _aliased(name, PREVIOUS), champion(name)
    if before is None or (now is not None and number(now) == number(before)):
        raise RegistryError(
            f"{name} had no other champion before; choose a version: pointsman registry promote {name} VERSION"
        )
    return promote(name, int(before.version))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
