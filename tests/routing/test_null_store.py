"""The store of statistics of base prompts that pools refer to: fetched once, whole or not at all, and checked."""

import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StoredFileError
from pipeline.routing.null import components, null_digest, read_null, write_null
from pipeline.routing.null_store import NullStore
from pipeline.routing.statistics import PromptStatistics

NULL = components(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)), 3)
LAYERS = {"layer.q": PromptStatistics.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(1)))}
DIGEST = null_digest(NULL, LAYERS)


class Source:
    """Has the statistics, and counts who asks for them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fetch(self, digest: str, file: Path) -> None:
        self.asked.append(digest)
        write_null(file, NULL, LAYERS)


def test_statistics_are_fetched_once(tmp_path: Path) -> None:
    source = Source()
    for _ in range(2):
        null, layer_statistics = NullStore(tmp_path / "cache", source.fetch).load(DIGEST)
        assert null_digest(null, layer_statistics) == DIGEST
    assert source.asked == [DIGEST]
    assert NullStore(tmp_path / "cache").load(DIGEST)[0][0].mean_F.equal(NULL[0].mean_F)


@pytest.mark.parametrize("place", [100, -1])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, place: int) -> None:
    source = Source()
    store = NullStore(tmp_path, source.fetch)
    store.load(DIGEST)
    file = store.file_of(DIGEST)
    whole = file.read_bytes()
    for damaged in (whole[:-9], b"", bytes(b ^ (i == place % len(whole)) for i, b in enumerate(whole))):
        file.write_bytes(damaged)
        with pytest.raises(StoredFileError, match=r"safetensors: damaged.*; load the pool from its registry"):
            NullStore(tmp_path).load(DIGEST)
        store.load(DIGEST)
        assert null_digest(*read_null(file)) == DIGEST
    assert len(source.asked) == 4


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StoredFileError, match=rf"{tmp_path}/{DIGEST}\.safetensors: missing; load the pool from its reg"
    ):
        NullStore(tmp_path).load(DIGEST)


def test_other_statistics_are_not_kept(tmp_path: Path) -> None:
    store = NullStore(tmp_path, lambda digest, file: write_null(file, NULL[:1], {}))
    with pytest.raises(StoredFileError, match="does not hold the statistics with digest"):
        store.load(DIGEST)
    assert not store.file_of(DIGEST).exists()


def _load(folder: Path, results: Any) -> None:
    def fetch(digest: str, file: Path) -> None:
        results.put("fetched")
        file.write_bytes(b"half")
        time.sleep(0.2)
        write_null(file, NULL, LAYERS)

    results.put(null_digest(*NullStore(folder, fetch).load(DIGEST)))


def test_several_processes_fetch_once(tmp_path: Path) -> None:
    context = get_context("fork")
    results = context.SimpleQueue()
    torch.set_num_threads(1)
    processes = [context.Process(target=_load, args=(tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(results.get() for _ in range(4)) == sorted([DIGEST] * 3 + ["fetched"])


def _killed(folder: Path) -> None:
    def fetch(digest: str, file: Path) -> None:
        write_null(file, NULL, LAYERS)
        os._exit(9)

    NullStore(folder, fetch).load(DIGEST)


def test_a_kill_while_fetching_leaves_nothing_half(tmp_path: Path) -> None:
    store = NullStore(tmp_path, Source().fetch)
    process = get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not store.file_of(DIGEST).exists()
    store.load(DIGEST)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{DIGEST}.safetensors", f"{DIGEST}.safetensors.lock"]
