"""The sums of a large pool in the user's cache: what is read, what is made anew, and that both give the same router."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import RouterConfig
from pipeline.routing import Pool
from pipeline.routing.call import Routers
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.router_cache import KEPT
from pipeline.routing.store import ExpertReference, ExpertStore, StoredExpert
from tests.helpers import make_expert

F, EXPERTS = 264, 66
ONE_LINEAR = r".*language_model\.layers\.0\.self_attn\.q_proj"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def entries(tiny_base, store) -> list[StoredExpert]:
    """Experts in a store."""
    made = []
    for number in range(EXPERTS + 2):
        random = torch.Generator().manual_seed(number)
        x_NF = 2 * torch.randn(F, generator=random) + torch.randn(12, F, generator=random)
        expert = make_expert(tiny_base, f"task{number}", rank=1, targets=ONE_LINEAR, features=x_NF, quantile=0.99)
        card = expert.card.model_copy(update={"config_digest": f"digest{number}"})
        made.append(StoredExpert(ExpertReference.of(store.put(replace(expert, card=card))), store))
    return made


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pointsman" / "routers"


def pool_of(entries: list[StoredExpert]) -> Pool:
    """Returns a pool that has read none of its experts."""
    pool = Pool("tiny", entries[0].expert.card.base_fingerprint, RouterConfig())
    return pool._with({entry.reference.name: StoredExpert(entry.reference, entry.store) for entry in entries})


def prompts(entries: list[StoredExpert]) -> torch.Tensor:
    return torch.stack([entry.expert.statistics.mean_F for entry in entries]) + 0.1


def same(router: PromptRouter, entries: list[StoredExpert]) -> None:
    """Fails where a router is not that of these experts."""
    expected, x_BF = PromptRouter([entry.expert.statistics for entry in entries]), prompts(entries)
    assert len(router.experts) == len(entries)
    assert router.choices(x_BF).equal(expected.choices(x_BF))
    torch.testing.assert_close(router.scores(x_BF), expected.scores(x_BF), rtol=1e-9, atol=1e-7)
    if expected.few is None:
        assert router.few is None
        return
    torch.testing.assert_close(router.few.pooled.scatter_FF, expected.few.pooled.scatter_FF, rtol=1e-6, atol=1e-6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the experts that were read."""
    names: list[str] = []
    load = ExpertStore.load

    def noted(self: ExpertStore, reference: ExpertReference):
        names.append(reference.name)
        return load(self, reference)

    monkeypatch.setattr(ExpertStore, "load", noted)
    return names


def test_opening_a_pool_again_reads_no_expert(entries, cache, read):
    pool = entries[:EXPERTS]
    same(Routers(pool_of(pool)).prompts, pool)
    assert len(list(cache.iterdir())) == 1
    read.clear()
    again = Routers(pool_of(list(reversed(pool)))).prompts
    assert read == []
    same(again, list(reversed(pool)))


def test_a_pool_that_differs_by_few_experts_reads_those(entries, cache, read):
    assert Routers(pool_of(entries[:EXPERTS])).prompts
    read.clear()
    more = [*entries[1:EXPERTS], entries[EXPERTS]]
    router = Routers(pool_of(more)).prompts
    assert set(read) == {"task0", f"task{EXPERTS}"}
    same(router, more)


def test_one_that_is_gone_for_good_is_not_taken_away(entries, tmp_path):
    folder = tmp_path / "experts"
    shutil.copytree(entries[0].store.folder, folder)
    store = ExpertStore(folder)
    moved = [StoredExpert(entry.reference, store) for entry in entries]
    assert Routers(pool_of(moved[:EXPERTS])).prompts
    shutil.rmtree(store.folder_of(moved[0].reference))
    same(Routers(pool_of(moved[1:EXPERTS])).prompts, moved[1:EXPERTS])


@pytest.mark.parametrize("damage", ["cut off", "a bit", "empty"])
def test_a_damaged_file_is_made_anew(entries, cache, damage):
    pool = entries[:EXPERTS]
    assert Routers(pool_of(pool)).prompts
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[-100] ^= 1
    file.write_bytes(content[: {"cut off": len(content) // 2, "a bit": len(content), "empty": 0}[damage]])
    same(Routers(pool_of(pool)).prompts, pool)
    same(Routers(pool_of(pool)).prompts, pool)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(entries, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    same(Routers(pool_of(entries[:EXPERTS])).prompts, entries[:EXPERTS])


def test_only_the_last_files_are_kept(entries, cache, monkeypatch):
    monkeypatch.setattr("pipeline.routing.router_cache.SMALLEST", 2)
    for count in range(2, KEPT + 5):
        assert Routers(pool_of(entries[:count])).prompts
    assert len(list(cache.iterdir())) == KEPT


def test_a_small_pool_leaves_nothing_behind(entries, cache):
    assert Routers(pool_of(entries[:10])).prompts
    assert not cache.exists()


@pytest.mark.parametrize("count", [8, EXPERTS])
def test_routers_of_the_next_pool_are_made_of_those_before(entries, read, count):
    before = Routers(pool_of(entries[:count]))
    pool = before.pool._with(before.pool.experts.entries | {entries[-1].reference.name: entries[-1]})
    read.clear()
    same(Routers(pool.retire("task1"), before).prompts.retiring([]), [*entries[:count], entries[-1]])
    assert Routers(pool.retire("task1"), before).prompts.retired == {1}
    read.clear()
    fewer = Routers(before.pool.remove("task0"), before).prompts
    assert set(read) <= {"task0"}
    same_small = entries[1:count]
    expected = PromptRouter([entry.expert.statistics for entry in same_small])
    assert fewer.choices(prompts(same_small)).equal(expected.choices(prompts(same_small)))


def test_other_settings_or_another_order_make_a_router_of_its_own(entries):
    before = Routers(pool_of(entries[:8]))
    for pool in (before.pool.routed_by(shrinkage=0.2), pool_of(list(reversed(entries[:8])))):
        assert Routers(pool, before).prompts.gaussians.pooled is not before.prompts.gaussians.pooled
        assert Routers(pool, before).prompts.shrinkage == pool.router.shrinkage
