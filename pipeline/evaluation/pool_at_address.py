"""A pool's folder at an address, for workers on nodes that share no file system with the driver."""

from pathlib import Path

from pipeline.routing.pool import Pool, PoolCard
from pipeline.routing.store import ExpertReference, ExpertStore, cache_folder
from pipeline.storage.mirror import fetch_folder
from pipeline.storage.remote import RemoteFolder


def pool_at_address(remote: RemoteFolder, folder: Path) -> Pool:
    """Copies a pool's folder into `folder` and reads it; its experts come into this node's cache when they are needed."""
    remote.download_folder(folder)
    card = PoolCard.read(folder)
    if card.store is None:
        return Pool.load(folder)
    store = remote / card.store

    def fetch(reference: ExpertReference, target: Path) -> None:
        assert reference.digest is not None, "only pools that hold their experts do not name digests"
        fetch_folder(store / reference.digest, target)

    return Pool.load(folder, ExpertStore(cache_folder(), fetch))
