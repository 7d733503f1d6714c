"""What outlives its statistics: pools of any version up to this code's, their experts one at a time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RouterConfig, digest
from pipeline.models.bases import Base
from pipeline.routing import Expert, ExpertError, Pool, PoolError, PromptStatistics
from pipeline.routing.pool import REFERRING
from pipeline.routing.serialization import FORMAT_VERSION, VERSIONS, OutdatedError
from pipeline.routing.store import ExpertReference, ExpertStore, StoredExpert
from pipeline.routing.trained import TrainedPool
from tests.helpers import make_expert


@pytest.fixture
def pool(tiny_base: Base) -> Pool:
    experts = [make_expert(tiny_base, name, rank=2, seed=seed) for seed, name in enumerate(("digits", "clock"))]
    named = [replace(e, card=e.card.model_copy(update={"config_digest": f"of-{e.card.name}"})) for e in experts]
    return Pool("tiny", tiny_base.fingerprint, RouterConfig(top_k=3), named)


@pytest.fixture
def folder(pool: Pool, tmp_path: Path) -> Path:
    return pool.save(tmp_path / "pool")


def change(file: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    file.with_name("contents.json").unlink(missing_ok=True)  # which earlier releases did not write
    card = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(card | values))


def test_a_pool_of_the_first_version_gives_its_experts_up(pool: Pool, folder: Path) -> None:
    """Cards without versions, settings that are no more, statistics that nobody can read."""
    settings = {"top_k": 3, "a_setting_of_old": 1}
    change(folder / "pool.json", drop=tuple(VERSIONS), router=settings, forgotten=1, experts=pool.names)
    for name in pool.names:
        change(folder / "experts" / name / "expert.json", drop=tuple(VERSIONS))
    with pytest.raises(OutdatedError):
        Pool.load(folder)
    actual = TrainedPool.load(folder)
    assert (actual.base_label, actual.base_fingerprint, actual.null) == ("tiny", pool.base_fingerprint, False)
    assert list(actual.experts) == ["digits", "clock"]
    assert actual.router == settings
    trained = actual.expert("clock")
    assert not trained.up_to_date
    assert trained.card.name == "clock"
    statistics = PromptStatistics.of(torch.randn(8, 32))
    expert = trained.described(statistics, {"a": PromptStatistics.of(torch.randn(8, 32))}, identity={"task": "clock"})
    loaded = Expert.load(expert.save(folder.parent / "clock"))
    named = {"identity": {"task": "clock"}, "config_digest": digest({"task": "clock"})}
    assert loaded.card == pool.experts["clock"].card.model_copy(update=named)
    assert loaded.statistics.width == 32
    assert loaded.layer_statistics.keys() == {"a"}
    for path, adapter in pool.experts["clock"].adapters.items():
        assert loaded.adapters[path].b_OR.equal(adapter.b_OR)
        assert loaded.vectors[path].equal(pool.experts["clock"].vectors[path])


def test_a_present_pool_is_up_to_date(folder: Path) -> None:
    assert TrainedPool.load(folder).expert("digits").up_to_date


def test_experts_may_lie_in_a_store(pool: Pool, tmp_path: Path) -> None:
    store = ExpertStore(tmp_path / "store")
    references = [ExpertReference.of(store.put(expert)) for expert in pool.experts.values()]
    stored = Pool(pool.base_label, pool.base_fingerprint, pool.router, [StoredExpert(r, store) for r in references])
    folder = stored.save(tmp_path / "pool")
    actual = TrainedPool.load(folder)
    assert actual.folder_of("clock").is_relative_to(tmp_path / "store")
    assert actual.expert("clock").card == pool.experts["clock"].card
    shutil.rmtree(actual.folder_of("clock"))
    with pytest.raises(ExpertError, match=r"expert 'clock' .*: missing or damaged in"):
        actual.expert("clock")


def test_another_rule_is_no_obstacle_and_a_newer_format_is(folder: Path) -> None:
    for file in ("pool.json", "experts/digits/expert.json"):
        change(folder / file, feature_rule=99)
    assert not TrainedPool.load(folder).expert("digits").up_to_date
    change(folder / "experts/digits/expert.json", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ExpertError, match=r"expert\.json: format_version is .*a newer release wrote it"):
        TrainedPool.load(folder).expert("digits")
    change(folder / "pool.json", format_version=REFERRING + 1)
    with pytest.raises(ExpertError, match=r"pool\.json: format_version is .*a newer release wrote it"):
        TrainedPool.load(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"experts": ["../digits"]}'])
def test_damaged_files_are_named(folder: Path, content: str) -> None:
    (folder / "experts" / "digits" / "contents.json").unlink()
    for name in ("expert.json", "adapter_config.json"):
        (folder / "experts" / "digits" / name).write_text(content[:2])
        with pytest.raises(ExpertError, match=r"damaged|only plain LoRA"):
            TrainedPool.load(folder).expert("digits")
    (folder / "pool.json").write_text(content)
    with pytest.raises(PoolError, match=r"pool\.json: damaged, or of another version"):
        TrainedPool.load(folder)
    (folder / "pool.json").unlink()
    with pytest.raises(PoolError, match=r"pool: no pool\.json, so not a pool folder"):
        TrainedPool.load(folder)
