"""Where the pool comes from that answers, and how a worker on any node opens it."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow

from pipeline.config import BaseModelConfig, digest, is_address
from pipeline.evaluation.pool_at_address import pool_at_address
from pipeline.files import user_cache
from pipeline.models.bases import as_loadable_here
from pipeline.prediction.errors import PredictError
from pipeline.registry.bases import SERVED, base_folder
from pipeline.registry.browsing import meant
from pipeline.registry.loading import fetched_pool
from pipeline.registry.names import read_name
from pipeline.registry.pools import served_settings
from pipeline.registry.tracking import use_registry
from pipeline.registry.versions import DIGEST, MODELS, logged_model
from pipeline.routing.pool import CARD, Pool, PoolError
from pipeline.storage.remote import RemoteFolder

_FOLDERS: dict[str, Path] = {}
"""Folders of registered bases on this machine, by the id of their logged model, which never changes."""

SETTING = "--registry"
"""Where the address of a registry was given, for messages."""

_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class PoolFolder:
    """A pool in a folder that all workers see."""

    address: str
    digest: str
    """Digest of what it holds."""
    base_config: BaseModelConfig
    expert_memory: int | None = None
    """Default limit of the experts' weights, in bytes."""

    @classmethod
    def of(cls, folder: Path, base: BaseModelConfig | None) -> "PoolFolder":
        """Reads the card of a pool's folder; raises PoolError for a folder that is none."""
        card = Pool.load(folder).card
        return cls(
            str(folder.resolve()), digest(card.model_dump(mode="json", exclude={"store"})), base or BaseModelConfig()
        )

    def base(self) -> BaseModelConfig:
        """Returns the base that the command names."""
        return self.base_config

    def pool(self) -> Pool:
        """Reads the pool."""
        return Pool.load(self.address)

    def settings(self) -> dict[str, Any]:
        """Returns what of the base's settings changes answers."""
        return self.base_config.model_dump(include={"dtype", "max_tiles"})


@dataclass(frozen=True)
class PoolAtAddress(PoolFolder):
    """A pool's folder at an address (s3://); each node fetches it and its experts into its own cache."""

    uri: str = field(default="", repr=False)
    """May hold keys."""

    @classmethod
    def at(cls, uri: str, base: BaseModelConfig | None) -> "PoolAtAddress":
        """Reads the card of a pool's folder; raises StorageError where that cannot be done, PoolError for another folder."""
        remote = RemoteFolder(uri)
        card = pool_at_address(remote, _cached(remote)).card
        name = digest(card.model_dump(mode="json", exclude={"store"}))
        return cls(str(remote), name, base or BaseModelConfig(), uri=uri)

    def pool(self) -> Pool:
        """Reads the pool."""
        remote = RemoteFolder(self.uri)
        return pool_at_address(remote, _cached(remote))


def _cached(remote: RemoteFolder) -> Path:
    """Returns this machine's folder for a pool's files, another one where its card is another."""
    content = remote.read(CARD)
    if content is None:
        raise PoolError(f"{remote}: no {CARD}, so not a pool folder")
    return user_cache("pools") / digest(str(remote), content.decode(errors="replace"))


@dataclass(frozen=True)
class RegisteredPool:
    """A version of a registry; each node fetches base and experts into its own cache."""

    address: str
    digest: str
    registry: str = field(repr=False)
    base_model_id: str
    base_settings: dict[str, Any]
    expert_memory: int | None = None
    credentials: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, address: str, registry: str, base: BaseModelConfig | None) -> "RegisteredPool":
        """Looks a version up, in whichever way it is named; raises RegistryError where there is none.

        `base` has the settings of the base that are not to be as registered.
        """
        use_registry(registry, SETTING)
        version = meant(address)
        served = served_settings(version)
        changes = {} if base is None else base.model_dump(include=base.model_fields_set)
        if other := changes.keys() - (SERVED - {"trust_remote_code"}):
            raise PredictError(
                f"base.{min(other)}: the registry says which base answers for {address}; leave it out, or name the pool's "
                "folder"
            )
        kept = {key: served[key] for key in SERVED & served.keys()}
        number = f"{MODELS}{version.name}/{version.version}"  # an alias may move meanwhile
        credentials = {name: os.environ[name] for name in _CREDENTIALS if name in os.environ}
        return cls(
            address=number,
            digest=logged_model(version).params.get(DIGEST, version.source),
            registry=mlflow.get_tracking_uri(),  # absolute: workers run in other folders
            base_model_id=served["base_model_id"],
            base_settings=kept | changes,
            expert_memory=served.get("expert_memory"),
            credentials=credentials,
        )

    def base(self) -> BaseModelConfig:
        """Returns the base as it was registered, its files on this machine; the registry is asked once per process."""
        if self.base_model_id not in _FOLDERS:
            self._connect()
            _FOLDERS[self.base_model_id] = base_folder(self.base_model_id)
        return as_loadable_here(BaseModelConfig(path=str(_FOLDERS[self.base_model_id]), **self.base_settings))

    def pool(self) -> Pool:
        """Reads the pool; what it refers to comes from the user's cache, or is fetched to it."""
        self._connect()
        return fetched_pool(self.address)

    def settings(self) -> dict[str, Any]:
        """Returns what of the base's settings changes answers."""
        return {key: self.base_settings.get(key) for key in ("dtype", "max_tiles")}

    def _connect(self) -> None:
        os.environ.update(self.credentials)
        use_registry(self.registry, SETTING)


PoolSource = PoolFolder | RegisteredPool
"""A pool that stays the same while it answers."""


def pool_source(address: str, registry: str, base: BaseModelConfig | None = None) -> PoolSource:
    """Returns the source of a pool in a folder, or in a registry: `models:/...`, or the name of a pool that is no folder."""
    model = re.split("[/@]", address)[0]
    if address.startswith(MODELS) or (not Path(address).exists() and read_name(model) is not None):
        return RegisteredPool.of(address, registry, base)
    if not address:
        raise PredictError("--pool: give a pool's folder, as runs/demo/pool, or models:/tiny.pool.demo@champion")
    if is_address(address):
        return PoolAtAddress.at(address, base)
    return PoolFolder.of(Path(address), base)


def check_base(base: BaseModelConfig, fingerprint: str, pool: Pool, address: str) -> None:
    """Raises PredictError where a pool was made for another base."""
    if fingerprint != pool.base_fingerprint:
        raise PredictError(
            f"{address}: made for base {pool.base_label!r} with fingerprint {pool.base_fingerprint}; {base.path} has "
            f"{fingerprint}; name the pool's base with base.path=..."
        )
