"""A pool's folder at an address, as bulk answers and explanations read it."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.prediction.pool_source import PoolFolder, pool_source
from pipeline.routing import Pool
from pipeline.routing.pool import PoolError
from pipeline.routing.store import CACHE_VARIABLE, ExpertReference, ExpertStore, StoredExpert
from pipeline.storage.remote import RemoteFolder


@pytest.fixture
def runs(known_pool: Pool, tmp_path: Path) -> Path:
    """An output folder with a pool and its experts."""
    store = ExpertStore(tmp_path / "runs" / "experts")
    pool = Pool(known_pool.base_label, known_pool.base_fingerprint, known_pool.router, (), known_pool.null)
    for number, expert in enumerate(known_pool.experts.values()):
        expert = replace(expert, card=expert.card.model_copy(update={"config_digest": f"d{number}"}))
        pool = pool.add(StoredExpert(ExpertReference.of(store.put(expert)), store))
    pool.save(tmp_path / "runs" / "mine" / "pool")
    return tmp_path / "runs"


def test_a_pool_at_an_address_is_that_of_its_folder(runs: Path, known_pool: Pool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "experts"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"local://{tmp_path}/there"
    RemoteFolder(uri).upload_folder(runs)
    source, folder = pool_source(f"{uri}/mine/pool", ""), pool_source(str(runs / "mine" / "pool"), "")
    assert isinstance(folder, PoolFolder)
    assert source.digest == folder.digest
    assert source.address == f"{uri}/mine/pool"
    for _ in range(2):
        pool = source.pool()
        assert pool.names == known_pool.names
        assert [pool.experts[name].card.config_digest for name in pool.names] == [
            f"d{number}" for number in range(len(pool.names))
        ]
    assert sorted(p.name for p in (tmp_path / "experts").glob("d?")) == sorted(pool.digests)


def test_an_address_without_a_pool_is_told(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=rf"^local://{tmp_path}/nothing: no pool\.json, so not a pool folder"):
        pool_source(f"local://{tmp_path}/nothing", "")
