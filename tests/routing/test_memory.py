"""Experts whose weights are read when a batch needs them: the very results of all experts in memory, in bounded memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from pipeline.config import BaseModelConfig
from pipeline.models.bases import Base, load_base
from pipeline.routing import ExpertError, Pool, RoutedModel
from pipeline.routing.memory import PagedExperts
from tests.helpers import attached, batch_of, claimed_prompts, generate, make_expert

LISTING = pytest.mark.parametrize("settings", [{"kind": "prompt"}, {"kind": "two_level"}], ids=["prompt", "two_level"])
RANK = 6
"""The largest in the pool."""


@pytest.fixture(scope="module")
def pool(tiny_base: Base, known_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Six experts of different ranks in a folder, three of which the router chooses."""
    pool = known_pool
    for number in range(3):
        pool = pool.add(make_expert(tiny_base, f"more{number}", rank=RANK - 2 * number, seed=10 + number))
    return Pool.load(pool.save(tmp_path_factory.mktemp("memory") / "pool"))


@pytest.fixture(scope="module")
def mixed(tiny_base: Base):
    return claimed_prompts(tiny_base, 2, seed=6)[0]


@contextmanager
def paged(base: Base, pool: Pool, experts: int, *, like: Pool | None = None) -> Iterator[RoutedModel]:
    """Routes with memory for so many experts of the pool, or of one that is `like` it."""
    with attached(base, like or pool) as routed:
        limit = experts * bytes_of_one(routed)
    routed = RoutedModel(base.model, pool, expert_memory=limit)
    try:
        memory = routed._loaded[1]
        assert (
            not isinstance(memory, PagedExperts) or resident(routed) <= limit * 1.25
        )  # a row of zeros beside each Linear's
        yield routed
    finally:
        routed.detach()


def bytes_of_one(routed: RoutedModel) -> int:
    by_path = routed._loaded[1].loaded.by_path.values()
    return sum(RANK * 4 * (here.down_SD.shape[1] + here.up_SO.shape[1]) for here in by_path)


def resident(routed: RoutedModel) -> int:
    return sum(here.down_SD.nbytes + here.up_SO.nbytes for here in routed._loaded[1].loaded.by_path.values())


def asked(base: Base, routed: RoutedModel, rows, name: str | None, *, forced: bool):
    if not forced:
        return generate(base, rows, tokens=3)
    with routed.forced(name):
        return generate(base, rows, tokens=3)


def questions(pool: Pool, mixed):
    """Every prompt alone and all of them as the router decides; one by each expert."""
    yield from (([row], None, False) for row in mixed)
    yield mixed, None, False
    yield from (([mixed[0]], name, True) for name in (*pool.names, None))


@LISTING
def test_results_are_those_of_all_in_memory(tiny_base, pool, mixed, settings, caplog):
    routed_pool = pool.routed_by(**settings)
    with attached(tiny_base, routed_pool) as routed:
        expected = [asked(tiny_base, routed, rows, n, forced=f) for rows, n, f in questions(pool, mixed)]
        decisions = routed.decisions
    with paged(tiny_base, routed_pool, 2) as routed:
        for _ in range(2):
            actual = [asked(tiny_base, routed, rows, n, forced=f) for rows, n, f in questions(pool, mixed)]
            for (tokens, logits), (tokens_, logits_) in zip(actual, expected, strict=True):
                assert tokens.equal(tokens_)
                assert logits.equal(logits_)
        assert routed.decisions == decisions
    assert (
        caplog.text.count("running batches need more experts at once than the 2 that it holds") == 1
    )  # all in one batch


def test_threads_at_once_get_their_own(tiny_base, pool, mixed):
    """Four threads, more experts in use at once than there are places."""
    work = list(questions(pool, mixed))
    with attached(tiny_base, pool) as routed:
        expected = [asked(tiny_base, routed, rows, n, forced=f) for rows, n, f in work]
    with paged(tiny_base, pool, 2) as routed, ThreadPoolExecutor(4) as threads:
        before, barrier = resident(routed), threading.Barrier(4)

        def run(first: int) -> list[bool]:
            barrier.wait()
            order = [(first + n) % len(work) for n in range(len(work))]
            return [
                asked(tiny_base, routed, work[i][0], work[i][1], forced=work[i][2])[1].equal(expected[i][1])
                for i in order
            ]

        assert all(all(right) for right in threads.map(run, (0, 4, 8, 12)))
        assert resident(routed) == before


def test_what_a_cache_holds_is_not_taken_away(tiny_base, pool, mixed, caplog):
    """A call that pauses between two tokens, while others have gone through all experts."""
    inputs, more = batch_of(tiny_base, mixed[:1]), torch.tensor([[7]])

    def begin(routed: RoutedModel) -> DynamicCache:
        cache = DynamicCache(config=tiny_base.model.config.text_config)
        with routed.forced("speaker"):
            tiny_base.model(**inputs, past_key_values=cache, use_cache=True)
        return cache

    def go_on(cache: DynamicCache) -> torch.Tensor:
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        return tiny_base.model(input_ids=more, attention_mask=mask, past_key_values=cache).logits

    with torch.inference_mode():
        with attached(tiny_base, pool) as routed:
            expected = go_on(begin(routed))
        with paged(tiny_base, pool, 2) as routed:
            cache = begin(routed)
            for name in pool.names * 2:
                asked(tiny_base, routed, mixed[:1], name, forced=True)
            assert go_on(cache).equal(expected)
            assert not caplog.text, "one place was left for them"


def test_places_are_for_those_used_last(tiny_base, pool, mixed):
    with paged(tiny_base, pool, 2) as routed:
        memory = routed._loaded[1]
        for name, there in (
            ("reader", {"reader"}),
            ("more1", {"reader", "more1"}),
            ("reader", {"reader", "more1"}),
            ("more2", {"reader", "more2"}),
        ):
            asked(tiny_base, routed, mixed[:1], name, forced=True)
            assert {pool.names[expert] for expert in memory._pages} == there


def test_an_expert_that_cannot_be_read_harms_no_other(tiny_base, pool, mixed, tmp_path):
    folder = pool.export(tmp_path / "pool")
    with attached(tiny_base, pool) as routed:
        expected = asked(tiny_base, routed, mixed[:1], "more1", forced=True)
    with paged(tiny_base, Pool.load(folder), 1, like=pool) as routed:
        weights = folder / "experts" / "more0" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        for _ in range(2):
            with pytest.raises(ExpertError, match="more0"):
                asked(tiny_base, routed, mixed[:1], "more0", forced=True)
            assert asked(tiny_base, routed, mixed[:1], "more1", forced=True)[1].equal(expected[1])


def test_who_chooses_from_all_has_all_and_is_told(tiny_base, pool, mixed, caplog):
    with paged(tiny_base, pool.routed_by(kind="token"), 2) as routed:
        assert "with router.kind `token` every Linear chooses from all 6 experts" in caplog.text
        assert not isinstance(routed._loaded[1], PagedExperts)
    caplog.clear()
    with paged(tiny_base, pool, 6) as routed:
        assert not isinstance(routed._loaded[1], PagedExperts), "all of them fit"
    assert not caplog.text


def test_a_limit_below_one_expert_keeps_one(tiny_base, pool, mixed, caplog):
    with attached(tiny_base, pool) as routed:
        expected = asked(tiny_base, routed, mixed[:1], "more1", forced=True)
    routed = RoutedModel(tiny_base.model, pool, expert_memory=1000)
    try:
        assert "less than one expert takes" in caplog.text
        assert asked(tiny_base, routed, mixed[:1], "more1", forced=True)[1].equal(expected[1])
    finally:
        routed.detach()


def test_a_base_that_is_moved_takes_them_along(tiny_folder, pool, mixed):
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    with paged(base, pool, 2) as routed:
        asked(base, routed, mixed[:1], "more1", forced=True)
        base.model.to(torch.float64)
        actual = [asked(base, routed, mixed[:1], name, forced=True) for name in ("more1", "more2")]
        assert {here.down_SD.dtype for here in routed._loaded[1].loaded.by_path.values()} == {torch.float64}
    with attached(base, pool) as routed:
        for name, (_, logits) in zip(("more1", "more2"), actual, strict=True):
            assert logits.equal(asked(base, routed, mixed[:1], name, forced=True)[1])
