"""Experts that pools refer to: fetched once and whole when they are missing or damaged, refused by name when wrong."""

import dataclasses
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pipeline.config import RouterConfig
from pipeline.routing import Expert, ExpertError, Pool
from pipeline.routing.adapters import ADAPTER_WEIGHTS
from pipeline.routing.contents import CONTENTS
from pipeline.routing.expert import CARD, FILES, ROUTER_WEIGHTS
from pipeline.routing.store import ExpertReference, ExpertStore, StoredExpert, cache_folder
from tests.helpers import make_expert

EACH_FILE = pytest.mark.parametrize("name", [*FILES, CONTENTS])


@pytest.fixture(scope="module")
def experts(tiny_base) -> list[Expert]:
    actual = [make_expert(tiny_base, name, rank=2, seed=i) for i, name in enumerate(("digits", "clock", "later"))]
    return [
        dataclasses.replace(e, card=e.card.model_copy(update={"config_digest": f"d{i}"})) for i, e in enumerate(actual)
    ]


@pytest.fixture
def registry(experts, tmp_path) -> "Registry":
    return Registry(tmp_path / "registry", experts)


class Registry:
    """Where experts are fetched from; counts how often."""

    def __init__(self, folder: Path, experts: list[Expert]) -> None:
        self.folder, self.fetched = folder, []
        self.references = [
            ExpertReference.of(expert.save(folder / expert.card.config_digest)).model_copy(
                update={"model": "tiny.experts", "version": i + 1}
            )
            for i, expert in enumerate(experts)
        ]

    def fetch(self, reference: ExpertReference, folder: Path) -> None:
        self.fetched.append(reference.name)
        shutil.copytree(self.folder / str(reference.digest), folder)


def damage(file: Path) -> None:
    """Flips a bit in the middle, as disks do: the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def read(expert: Expert) -> Expert:
    """Reads all parts of an expert."""
    assert [*expert.adapters.values(), *expert.vectors.values(), *expert.layer_statistics.values()]
    return expert


def test_what_is_missing_is_fetched_once(registry, experts, tmp_path):
    store = ExpertStore(tmp_path / "cache", registry.fetch)
    for _ in range(2):
        for reference, expert in zip(registry.references, experts, strict=True):
            actual = read(store.load(reference))
            assert actual.card == expert.card
            path = next(iter(expert.adapters))
            assert actual.adapters[path].b_OR.equal(expert.adapters[path].b_OR)
    assert registry.fetched == ["digits", "clock", "later"]
    assert sorted(p.name for p in store.folder.iterdir() if p.is_dir()) == ["d0", "d1", "d2"]


@EACH_FILE
def test_what_is_damaged_is_fetched_again(registry, tmp_path, name):
    store = ExpertStore(tmp_path / "cache", registry.fetch)
    folder, reference = store.ensure(registry.references[0]), registry.references[0]
    damage(folder / name)
    read(store.load(reference))
    assert registry.fetched == ["digits", "digits"]
    assert (folder / name).read_bytes() == (registry.folder / "d0" / name).read_bytes()


@EACH_FILE
def test_what_is_damaged_and_not_to_be_had_is_named(registry, tmp_path, name):
    reference = registry.references[1]
    ExpertStore(tmp_path / "cache", registry.fetch).ensure(reference)
    damage(tmp_path / "cache" / "d1" / name)
    with pytest.raises(ExpertError, match=r"expert 'clock' \(digest d1, version 2 of tiny\.experts\): .*; "):
        read(ExpertStore(tmp_path / "cache").load(reference))


def test_what_was_cut_off_is_told_without_reading_it(registry, tmp_path, monkeypatch):
    store = ExpertStore(tmp_path / "cache", registry.fetch)
    folder = store.ensure(registry.references[0])
    os.truncate(folder / ADAPTER_WEIGHTS, 100)
    assert registry.references[0].damage(folder) == (
        f"{ADAPTER_WEIGHTS} is damaged: 100 bytes instead of {(registry.folder / 'd0' / ADAPTER_WEIGHTS).stat().st_size}"
    )
    assert not store.has(registry.references[0])


def test_an_expert_that_is_nowhere_is_named_with_a_remedy(registry, tmp_path):
    with pytest.raises(
        ExpertError,
        match=r"expert 'later' \(digest d2, version 3 of tiny\.experts\): .*cache/d2: it is not there; copy that folder",
    ):
        ExpertStore(tmp_path / "cache").load(registry.references[2])
    assert not (tmp_path / "cache").exists()


def test_another_expert_is_refused_by_name(registry, experts, tmp_path):
    """The same digest, other weights, as after another training of the same thing; or another expert in its place."""
    cache, reference = tmp_path / "cache", registry.references[0]
    adapters = {path: dataclasses.replace(a, b_OR=a.b_OR + 1) for path, a in experts[0].adapters.items()}
    twin = dataclasses.replace(experts[0], adapters=adapters)
    for other, output in ((twin, "its files are not those that were registered"), (experts[1], "it is expert 'clock'")):
        other.save(cache / "d0")
        with pytest.raises(ExpertError, match=rf"expert 'digits' \(digest d0, .*{output}"):
            ExpertStore(cache).load(reference)
        other.save(registry.folder / "d0")
        with pytest.raises(ExpertError, match=rf"expert 'digits' .*: what was fetched is not that: {output}"):
            ExpertStore(cache, registry.fetch).load(reference)
        assert Expert.load(cache / "d0").card == other.card, "nothing was replaced"


def test_damage_in_the_registry_is_told_with_the_version(registry, tmp_path):
    """Of equal size, so that only reading tells it."""
    weights = registry.folder / "d0" / ADAPTER_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store = ExpertStore(tmp_path / "cache", registry.fetch)
    for _ in range(2):
        with pytest.raises(
            ExpertError,
            match=r"expert 'digits' \(digest d0, version 1 of tiny\.experts\): what was fetched is not that: adapter_model.*: "
            "its bytes are not those .*; bring its files back in the registry",
        ):
            read(store.load(registry.references[0]))
    weights.write_bytes(whole)
    read(store.load(registry.references[0]))


def test_an_expert_of_an_earlier_release_has_no_list_of_contents(registry, tmp_path):
    (registry.folder / "d0" / CONTENTS).unlink()
    reference = registry.references[0].model_copy(update={"content": None})
    store = ExpertStore(tmp_path / "cache", registry.fetch)
    read(store.load(reference))
    os.truncate(tmp_path / "cache" / "d0" / ROUTER_WEIGHTS, 1000)
    read(store.load(reference))
    assert registry.fetched == ["digits", "digits"]


def test_the_first_of_a_digest_stays(experts, tmp_path):
    store = ExpertStore(tmp_path / "store")
    folder = store.put(experts[0])
    before = (folder / ADAPTER_WEIGHTS).stat().st_mtime_ns
    assert store.put(experts[0]) == folder
    assert (folder / ADAPTER_WEIGHTS).stat().st_mtime_ns == before
    (folder / CARD).unlink()
    store.put(experts[0])
    read(Expert.load(folder))


def _load(folder: Path, registry: Path, reference: ExpertReference, results) -> None:
    """One of several processes that want the same expert; fetching takes its time."""

    def fetch(reference: ExpertReference, into: Path) -> None:
        results.put("fetched")
        into.mkdir()
        for name in (*FILES, CONTENTS):
            shutil.copyfile(registry / str(reference.digest) / name, into / name)
            time.sleep(0.05)

    expert = ExpertStore(folder, fetch).load(reference)
    results.put(float(sum(a.b_OR.sum() for a in expert.adapters.values())))


def test_several_processes_fetch_once(registry, experts, tmp_path):
    context = get_context("fork")
    results = context.SimpleQueue()
    wanted = (tmp_path / "cache", registry.folder, registry.references[0], results)
    torch.set_num_threads(1)
    processes = [context.Process(target=_load, args=wanted) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    actual = [results.get() for _ in range(5)]
    assert actual.count("fetched") == 1
    expected = float(sum(a.b_OR.sum() for a in experts[0].adapters.values()))
    assert [value for value in actual if value != "fetched"] == pytest.approx([expected] * 4)


def _killed(folder: Path, registry: Path, reference: ExpertReference) -> None:
    def fetch(reference: ExpertReference, into: Path) -> None:
        into.mkdir()
        shutil.copyfile(registry / str(reference.digest) / CARD, into / CARD)
        os._exit(9)

    ExpertStore(folder, fetch).load(reference)


def test_a_kill_while_fetching_leaves_nothing_half(registry, tmp_path):
    store, reference = ExpertStore(tmp_path / "cache", registry.fetch), registry.references[0]
    process = get_context("fork").Process(target=_killed, args=(store.folder, registry.folder, reference))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not store.has(reference)
    read(store.load(reference))
    assert [p.name for p in store.folder.iterdir() if p.is_dir()] == ["d0"], "what the killed process left is gone"


def test_threads_may_ask_at_once(registry, tmp_path):
    store, start = ExpertStore(tmp_path / "cache", registry.fetch), threading.Barrier(6)

    def ask(number: int) -> str:
        start.wait()
        return read(store.load(registry.references[number % 3])).card.name

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(ask, range(6))) == sorted(2 * ["digits", "clock", "later"])
    assert sorted(registry.fetched) == ["clock", "digits", "later"]


def test_the_cache_is_the_users_or_a_folder_of_his_choice(monkeypatch, tmp_path):
    monkeypatch.delenv("POINTSMAN_EXPERTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pointsman" / "experts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/pointsman/experts")
    monkeypatch.setenv("POINTSMAN_EXPERTS", "~/mine")
    assert cache_folder() == Path("/home/somebody/mine")


# Pools


def pool_of(registry: Registry, fingerprint: str, store: ExpertStore) -> Pool:
    pool = Pool("tiny", fingerprint, RouterConfig())
    for reference in registry.references:
        pool = pool.add(StoredExpert(reference, store))
    return pool


def test_a_pool_refers_to_experts_in_a_store(registry, tiny_base, tmp_path):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    pool = pool_of(registry, tiny_base.fingerprint, store)
    folder = pool.save(tmp_path / "run" / "pool")
    assert [p.name for p in folder.iterdir()] == ["pool.json"]
    assert (folder / "pool.json").stat().st_size < 3000
    loaded = Pool.load(folder)  # found by itself, where they lay beside the pool
    assert loaded.card == pool.card
    assert [read(expert).card.name for expert in loaded.experts.values()] == pool.names
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    shutil.move(tmp_path / "experts", tmp_path / "moved")
    assert (
        Pool.load(tmp_path / "elsewhere" / "pool", ExpertStore(tmp_path / "moved")).experts["clock"].card.name
        == "clock"
    )


def test_experts_that_are_not_beside_the_pool_are_in_the_users_cache(registry, tiny_base, tmp_path, monkeypatch):
    folder = pool_of(registry, tiny_base.fingerprint, ExpertStore(tmp_path / "experts", registry.fetch)).save(
        tmp_path / "p"
    )
    shutil.move(tmp_path / "experts", tmp_path / "cache")
    monkeypatch.setenv("POINTSMAN_EXPERTS", str(tmp_path / "cache"))
    assert Pool.load(folder).experts["later"].card.name == "later"


def test_an_exported_pool_needs_nothing_else(registry, experts, tiny_base, tmp_path):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    pool = pool_of(registry, tiny_base.fingerprint, store)
    folder = pool.export(tmp_path / "whole")
    shutil.rmtree(store.folder)
    loaded = Pool.load(folder)
    assert loaded.card == pool.card
    assert loaded.export(tmp_path / "again") == tmp_path / "again"
    shutil.rmtree(folder)
    for actual, expert in zip(Pool.load(tmp_path / "again").experts.values(), experts, strict=True):
        path = next(iter(expert.adapters))
        assert read(actual).adapters[path].a_RD.equal(expert.adapters[path].a_RD)


def test_an_export_checks_every_file(registry, tiny_base, tmp_path):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    pool = pool_of(registry, tiny_base.fingerprint, store)
    damage(store.folder / "d1" / ADAPTER_WEIGHTS)
    pool.export(tmp_path / "whole")
    assert registry.fetched.count("clock") == 2
    damage(store.folder / "d1" / ADAPTER_WEIGHTS)
    cold = Pool.load(pool.save(tmp_path / "pool"))
    with pytest.raises(ExpertError, match=r"expert 'clock' .*adapter_model\.safetensors: damaged"):
        cold.export(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_lies_in_no_store_the_pool_holds(registry, tiny_base, tmp_path):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    pool = pool_of(registry, tiny_base.fingerprint, store).remove("clock").add(make_expert(tiny_base, "new", rank=2))
    folder = pool.save(tmp_path / "pool")
    assert [p.name for p in (folder / "experts").iterdir()] == ["new"]
    assert [read(expert).card.name for expert in Pool.load(folder).experts.values()] == ["digits", "later", "new"]


def test_adding_looks_at_the_new_expert_alone(registry, tiny_base, tmp_path, monkeypatch):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    folder = pool_of(registry, tiny_base.fingerprint, store).save(tmp_path / "pool")
    looked_at, load = [], Expert.load

    def spy(folder, **settings):
        looked_at.append(Path(folder).name)
        return load(folder, **settings)

    monkeypatch.setattr(Expert, "load", spy)
    pool = Pool.load(folder)
    assert looked_at == [], "opening a pool reads no expert"
    pool = pool.add(make_expert(tiny_base, "new", rank=2))
    assert looked_at == []
    pool.add(StoredExpert(registry.references[0], store)).save(tmp_path / "other")
    assert looked_at == ["d0"]


def test_opening_experts_reads_no_adapter(registry, tiny_base, tmp_path, monkeypatch):
    """Statistics are what routers need; the adapters' weights are mapped by who answers with them."""
    folder = pool_of(registry, tiny_base.fingerprint, ExpertStore(tmp_path / "experts", registry.fetch)).save(
        tmp_path / "p"
    )
    monkeypatch.setattr("pipeline.routing.adapters.load_file", lambda file: pytest.fail(f"{file} was read"))
    pool = Pool.load(folder)
    assert pool.width == 512
    assert {len(expert.adapters) for expert in pool.experts.values()} == {28}
    assert all(expert.statistics.count for expert in pool.experts.values())


def test_what_a_pool_continues(registry, tiny_base, tmp_path):
    store = ExpertStore(tmp_path / "experts", registry.fetch)
    whole = pool_of(registry, tiny_base.fingerprint, store)
    begun = whole.remove("later")
    assert whole.card.continues(begun.card)
    assert whole.card.continues(whole.card)
    assert not begun.card.continues(whole.card)
    assert not whole.card.continues(whole.remove("digits").card)
    assert not whole.card.continues(begun.routed_by(kind="token").card)


def test_an_expert_that_is_here_is_not_read_elsewhere(experts, tmp_path):
    store = ExpertStore(tmp_path / "store")
    source = experts[0].save(tmp_path / "source")
    reference = ExpertReference.of(source)
    folder = store.take(reference, source)
    os.truncate(source / ADAPTER_WEIGHTS, 100)
    assert store.take(reference, source) == folder
    read(store.load(reference))
    shutil.rmtree(folder)
    with pytest.raises(ExpertError, match=r"source/adapter_model\.safetensors: "):
        store.take(reference, source)
    assert not store.has(reference)


def test_a_short_reference_is_the_same_reference():
    whole = ExpertReference(name="digits", digest="d0", content="a" * 64, model="tiny.expert.digits", version=3)
    assert whole.short == f"tiny.expert.digits/3 d0 {'a' * 64}"
    for reference in (
        whole,
        whole.model_copy(update={"model": "tiny.experts"}),
        whole.model_copy(update={"content": None}),
        ExpertReference(name="digits"),
    ):
        assert ExpertReference.model_validate(reference.short) == reference
    assert ExpertReference.model_validate("digits") == ExpertReference(name="digits")
    for wrong in ("tiny.expert.digits/3 d0", "tiny.expert.digits/x d0 c", "tiny.expert./3 d0 c", "a/../3 d0 c"):
        with pytest.raises(ValueError, match="validation error|invalid literal|unpack"):
            ExpertReference.model_validate(wrong)
