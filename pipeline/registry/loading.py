"""Pools read back from the registry: a version's own files, and what they refer to, by way of the user's cache."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from pipeline.registry.base_prompts import fetch_base_prompts
from pipeline.registry.experts import registered_experts
from pipeline.registry.names import no_pool
from pipeline.registry.retries import RegistryError, RegistryFailedError
from pipeline.registry.versions import logged_model_id, version_at
from pipeline.routing.null_store import NullStore
from pipeline.routing.pool import CARD, Pool, PoolError
from pipeline.routing.store import ExpertStore, null_cache_folder


def fetched_pool(address: str, store: ExpertStore | None = None) -> Pool:
    """Reads a registered pool (`versions.version_at`); raises RegistryError as `download_pool` and `read_pool` do.

    Experts that it holds itself, as those of earlier releases do, are kept in `store` (default: the user's cache) from now on.
    """
    store = store or registered_experts()
    with tempfile.TemporaryDirectory() as scratch:
        folder = download_pool(address, scratch)
        pool = read_pool(folder, address, store)
        with _read_from(folder, address):
            return pool.kept_in(store)


def download_pool(address: str, into: str | Path) -> Path:
    """Copies the folder of a registered pool (`versions.version_at`) below `into`; returns it.

    An earlier release may have written it. The folder refers to its experts and to its statistics of base prompts; those of
    earlier releases contain them.
    """
    version = version_at(address)
    location = MlflowClient().get_logged_model(logged_model_id(version)).artifact_location
    if not any(Path(item.path).name == "artifacts" for item in mlflow.artifacts.list_artifacts(artifact_uri=location)):
        raise RegistryError(f"{address}: {no_pool(version.name)}")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"{location}/artifacts", dst_path=str(into))
    found = next((card.parent for card in Path(folder).rglob(CARD)), None)
    if found is None:
        raise RegistryError(
            f"{address}: {CARD} is missing below {location}; bring its files back, or use another version"
        )
    return found


def read_pool(folder: Path, what: str, store: ExpertStore | None = None) -> Pool:
    """Reads the folder of a registered pool, which messages call `what`.

    Its experts are read from `store` (default: the user's cache, filled from the registry) when they are looked up; statistics
    of base prompts come from that cache. Raises RegistryError where a file is damaged or cannot be had, ExpertError for one
    that another release has written.
    """
    with _read_from(folder, what):
        return Pool.load(folder, store or registered_experts(), registered_base_prompts())


@contextmanager
def _read_from(folder: Path, what: str) -> Iterator[None]:
    """Makes errors name the registered pool instead of the folder that it was copied to."""
    try:
        yield
    except PoolError as error:
        reason = str(error).replace(f"{folder}/", "").partition(";")[0]
        raise RegistryError(
            f"{what} is damaged in its registry: {reason}; bring its files back there, or use another version"
        ) from None
    except RegistryFailedError:
        raise
    except RegistryError as error:
        raise RegistryError(f"{what} needs {error}") from None


def registered_base_prompts() -> NullStore:
    """Returns the store of the statistics of base prompts of registered pools: the user's cache, filled from the registry."""
    return NullStore(null_cache_folder(), fetch_base_prompts)
