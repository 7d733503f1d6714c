"""Migration of a registry of earlier releases, where one model held all experts of a base and one all pools.

Each former version becomes a version of its expert's or pool's own model that points to the same artifacts: nothing is copied,
and the former models stay, since pools that are in use refer to them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from pipeline.config import without_secrets
from pipeline.registry.names import base_name, expert_name, former_names, pool_name
from pipeline.registry.promotion import CHAMPION, champion, promote
from pipeline.registry.retries import RegistryError
from pipeline.registry.versions import (
    DIGEST,
    PAGE,
    REGISTERED,
    create_version,
    find_version,
    logged_model_id,
    number,
    paged,
    versions_of,
)

FORMER_DIGEST, FORMER_FINISHED = "config_digest", "finished"
"""Tags of a version in earlier releases."""

MIGRATED = "migrated"
"""Tag of a former registered model: number of the last version that was migrated."""

UNKNOWN = "former"
"""Name of a pool whose run is gone."""


@dataclass(frozen=True)
class Step:
    """A former version and where it goes."""

    version: ModelVersion
    target: str
    """Its new registered model."""
    is_champion: bool = False
    """Whether it is the champion of its new model."""

    @property
    def digest(self) -> str:
        """Digest of what it was made from."""
        return self.version.tags[FORMER_DIGEST]

    def __str__(self) -> str:
        return f"{self.version.name} {self.version.version} -> {self.target}" + " (champion)" * self.is_champion

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return {
            "from": f"{self.version.name}/{self.version.version}",
            "to": self.target,
            "champion": self.is_champion,
        }

    @property
    def done(self) -> bool:
        """Whether it is there already."""
        return find_version(self.target, self.digest) is not None


def steps(base_label: str) -> Iterator[Step]:
    """Yields what a migration of a base's former models does, in its order: bases, experts, pools, each as they came."""
    former = former_names(base_label)
    for version in _finished(former.bases):
        yield Step(version, base_name(base_label))
    for version in _finished(former.experts):
        yield Step(version, expert_name(base_label, version.tags["task"]))
    pools = list(_finished(former.pools))
    used = MlflowClient().search_registered_models(f"name = '{former.pools}'")
    in_use = str(used[0].aliases.get(CHAMPION, "")) if used else ""
    for version in pools:
        yield Step(version, pool_name(base_label, _pool_of(version)), is_champion=str(version.version) == in_use)


def bases_to_migrate(base_label: str | None = None) -> list[str]:
    """Returns the labels of all bases with experts or pools of earlier releases, or the one that is asked for.

    Raises RegistryError where that has none.
    """
    names = [model.name for model in paged(partial(MlflowClient().search_registered_models, max_results=PAGE))]
    labels = sorted({name.removesuffix(".experts") for name in names if name.endswith(".experts")})
    if base_label is None:
        return labels
    if base_label not in labels:
        raise RegistryError(
            f"no experts of an earlier release for base {base_label!r}; bases with some: {labels or 'none'}"
        )
    return [base_label]


def migrate(base_label: str, *, dry: bool = False) -> Iterator[Step]:
    """Gives every former version of a base its new name; yields each that was to be moved. Safe to stop and repeat.

    With `dry` nothing is changed. `champion` follows, unless its new model has one.
    """
    for step in steps(base_label):
        if not step.done:
            if not dry:
                _move(step)
            yield step
        if step.is_champion and not dry and champion(step.target) is None:
            version = find_version(step.target, step.digest)
            assert version is not None, "moved just now"
            promote(step.target, str(version.version), checked=False)
    for name in () if dry else former_names(base_label):
        if finished := _finished(name):
            MlflowClient().set_registered_model_tag(name, MIGRATED, str(finished[-1].version))


def waiting_for_migration(base_label: str) -> str:
    """Returns which former model of a base has versions that were not migrated; empty if none has."""
    for name in former_names(base_label):
        models = MlflowClient().search_registered_models(f"name = '{name}'")
        moved = int(models[0].tags.get(MIGRATED, 0)) if models else 0
        if waiting := [version for version in (_finished(name) if models else ()) if number(version) > moved]:
            return f"{name} holds {len(waiting)} versions of an earlier release"
    return ""


def check_names(base_label: str) -> None:
    """Raises RegistryError where the registry has experts of an earlier release for this base that were not migrated."""
    if waiting := waiting_for_migration(base_label):
        raise RegistryError(
            f"{waiting}: `pointsman registry migrate --registry {without_secrets(mlflow.get_tracking_uri())}` gives them their "
            "new names without copying anything (`--dry-run` shows them); or choose another registry.uri"
        )


def _finished(name: str) -> list[ModelVersion]:
    return [v for v in reversed(versions_of(name)) if v.tags.get(FORMER_FINISHED) == "true" and FORMER_DIGEST in v.tags]


def _pool_of(version: ModelVersion) -> str:
    """Returns the name of a former version's stream, which its run knows."""
    try:
        return MlflowClient().get_run(version.run_id).data.params.get("name", UNKNOWN)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return UNKNOWN


@lru_cache(maxsize=8)
def _rows(run_id: str) -> dict[tuple[str, str], int]:
    """Returns the numbers of rows that a run has read, by task and fingerprint; a run has learned many tasks."""
    try:
        inputs = MlflowClient().get_run(run_id).inputs.dataset_inputs
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return {}
    rows = {}
    for each in inputs:
        count = json.loads(each.dataset.profile or "{}").get("num_rows")
        if count is not None:
            rows[each.dataset.name, each.dataset.digest] = int(count)
    return rows


def _move(step: Step) -> None:
    client, version, model_id = MlflowClient(), step.version, logged_model_id(step.version)
    if DIGEST not in client.get_logged_model(model_id).params:
        settings = {key: value for key, value in version.tags.items() if key not in (FORMER_DIGEST, FORMER_FINISHED)}
        client.log_model_params(model_id, {**settings, DIGEST: step.digest})
    former = f"Moved from {version.name} {version.version}, of an earlier release."
    tags: dict[str, object] = {"status": REGISTERED}
    if "rank" in version.tags:
        tags["rank"] = version.tags["rank"]
    learned_from = version.tags.get("task", ""), version.tags.get("data_fingerprint", "")[:36]
    if (rows := _rows(version.run_id).get(learned_from)) is not None:
        tags["rows"] = f"{rows:,}"
    create_version(
        step.target,
        model_id,
        version.run_id,
        tags=tags,
        description=former,
    )
