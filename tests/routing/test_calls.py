"""Calls that run at once on one routed model, from several threads, tasks or caches: nobody sees another's route."""

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import DynamicCache, StaticCache

from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from pipeline.models.generation import generate_answers
from pipeline.routing import Decision, Pool, PoolError, RoutedModel
from pipeline.routing.insight import candidates_of_call, explain
from pipeline.routing.routed_linear import RoutedLinear
from tests.helpers import (
    CLAIMS,
    GENERAL,
    ask,
    assert_same,
    attached,
    batch_of,
    claimed_prompts,
    generate,
    make_expert,
    prompts,
)

TOKENS = 3
THREADS = 8
PHATGOOSE = {"kind": "token", "token_scores": "phatgoose"}
EVERY_ROUTER = [{"kind": "prompt"}, {"kind": "token"}, PHATGOOSE, {"kind": "two_level"}]
every_router = pytest.mark.parametrize("settings", EVERY_ROUTER, ids=["prompt", "token", "published", "two_level"])


@pytest.fixture(scope="module")
def mixed(tiny_base):
    return claimed_prompts(tiny_base, 3, seed=6)


def at_once(task: Callable[[int], Any], count: int, threads: int = THREADS) -> list[Any]:
    """Runs task 0, 1, .. in threads that all begin together."""
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=barrier.wait) as pool:
        return list(pool.map(task, range(count)))


def rounded(decisions: list[Decision]) -> tuple[str | None, Any]:
    """Returns the expert of the only row and the weights, which may differ in the last digits."""
    (decision,) = decisions
    return decision.expert, pytest.approx(decision.weights, abs=1e-5)


def answer(base, row) -> str:
    return generate_answers(base.model, base.processor, [row], max_new_tokens=TOKENS)[0]


@every_router
def test_threads_get_the_answers_of_one_by_one(tiny_base, known_pool, mixed, settings):
    rows, owners = mixed
    with attached(tiny_base, known_pool.routed_by(**settings)) as routed:

        def ask_one(number: int) -> tuple[str, str | None, Any, list[str | None]]:
            with routed.call() as call:
                text = answer(tiny_base, rows[number % len(rows)])
            assert call.decisions == routed.decisions
            (decision,) = call.decisions
            return (
                text,
                decision.expert,
                decision.weights,
                [candidate.name for candidate in candidates_of_call(call)[0]],
            )

        expected = [
            (text, expert, pytest.approx(weights, abs=1e-5), names)
            for text, expert, weights, names in map(ask_one, range(len(rows)))
        ]
        assert settings == PHATGOOSE or [expert for _, expert, _, _ in expected] == owners
        assert at_once(ask_one, 4 * len(rows)) == 4 * expected


def test_what_one_thread_forces_another_does_not_see(tiny_base, known_pool, mixed):
    rows, owners = mixed
    with attached(tiny_base, known_pool) as routed:

        def ask_one(number: int) -> str | None:
            row = number % len(rows)
            if number % 3 == 2:
                answer(tiny_base, rows[row])
                return routed.decisions[0].expert
            forced = (*CLAIMS, None)[number % 4]
            with routed.forced(forced):
                answer(tiny_base, rows[row])
            return routed.decisions[0].expert == forced

        actual = at_once(ask_one, 4 * len(rows))
    assert actual == [owners[n % len(rows)] if n % 3 == 2 else True for n in range(len(actual))]


def test_traces_and_prompt_masks_are_the_threads_own(tiny_base, known_pool, mixed):
    rows, _ = mixed
    trained = ask(tiny_base.processor, "repeat : red blue", answer="red blue")
    with attached(tiny_base, known_pool.routed_by(**PHATGOOSE)) as routed, torch.inference_mode():
        expected = [explain(routed, batch_of(tiny_base, [row])) for row in rows]

        def run(number: int) -> bool:
            with torch.inference_mode():
                if number % 2:
                    routed._reader.prompt_mask = torch.from_numpy(trained.labels == -100)[None]
                    tiny_base.model(**batch_of(tiny_base, [trained]))
                    routed._reader.prompt_mask = None
                    return routed.last.state.traces is None and not routed.last.state.tokens_BT.all()
                (actual,) = explain(routed, batch_of(tiny_base, [rows[number % len(rows)]]))
            (own,) = expected[number % len(rows)]
            return all(
                torch.allclose(weights, own.weights[path], atol=1e-5) for path, weights in actual.weights.items()
            )

        assert all(at_once(run, 4 * len(rows)))


@every_router
@pytest.mark.parametrize("make", [lambda base: DynamicCache(), lambda base: None], ids=["own", "the model's"])
def test_two_answers_in_turns_in_one_thread(tiny_base, known_pool, mixed, settings, make):
    """Each has its KV cache; the steps of one come between those of the other."""
    rows = [mixed[0][0], mixed[0][3]]
    with attached(tiny_base, known_pool.routed_by(**settings)) as routed, torch.inference_mode():
        expected = [generate(tiny_base, [row], tokens=TOKENS)[1] for row in rows]
        wanted = [generate(tiny_base, [row], tokens=1) and routed.decisions for row in rows]
        batches = [batch_of(tiny_base, [row]) for row in rows]
        calls, outputs = [], []
        for batch in batches:
            with routed.call() as call:
                outputs.append(tiny_base.model(**batch, past_key_values=make(tiny_base), use_cache=True))
            calls.append(call)
        actual = [[output.logits[:, -1]] for output in outputs]
        masks = [batch["attention_mask"] for batch in batches]
        for _ in range(TOKENS - 1):
            for i, output in enumerate(outputs):
                masks[i] = torch.cat([masks[i], masks[i].new_ones(1, 1)], dim=-1)
                outputs[i] = tiny_base.model(
                    input_ids=actual[i][-1].argmax(-1, keepdim=True),
                    attention_mask=masks[i],
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                actual[i].append(outputs[i].logits[:, -1])
        assert [call.decisions for call in calls] == wanted
    for logits, own in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.stack(logits, dim=1), own, rtol=1e-4, atol=2e-4)


def test_asynchronous_tasks_in_one_thread_keep_apart(tiny_base, known_pool, mixed):
    rows, owners = mixed

    async def ask_one(routed: RoutedModel, number: int) -> list[str | None]:
        forced = (*CLAIMS, None)[number % 4]
        with routed.call() as call, routed.forced(forced):
            await asyncio.sleep(0)
            answer(tiny_base, rows[number])
            await asyncio.sleep(0)
            inside = call.decisions[0].expert, routed.decisions[0].expert
        await asyncio.sleep(0)
        with routed.call() as call:
            await asyncio.to_thread(answer, tiny_base, rows[number])  # takes the task's context along
        return [*inside, forced, call.decisions[0].expert]

    async def ask_all() -> list[list[str | None]]:
        return await asyncio.gather(*(ask_one(routed, number) for number in range(len(rows))))

    with attached(tiny_base, known_pool) as routed:
        for (inside, last, forced, free), owner in zip(asyncio.run(ask_all()), owners, strict=True):
            assert (inside, last, free) == (forced, forced, owner)


def test_a_call_ends_with_the_pool_it_began_with(tiny_base, known_pool, mixed):
    """The other pool has another order, fewer experts and adapts other Linears."""
    rows = [mixed[0][0], mixed[0][3]]
    narrow = make_expert(tiny_base, "narrow", targets=r"model\.language_model\.layers\.3\.mlp\.up_proj")
    for pool in (known_pool, known_pool.routed_by(kind="token"), known_pool.routed_by(**PHATGOOSE)):
        other = Pool("tiny", tiny_base.fingerprint, pool.router, [narrow])
        with attached(tiny_base, pool) as routed, torch.inference_mode():
            batch = batch_of(tiny_base, rows)
            expected = generate(tiny_base, rows, tokens=2)
            decisions = routed.decisions
            with routed.call() as call:
                output = tiny_base.model(**batch, use_cache=True)
            routed.load(other)
            generate(tiny_base, rows, tokens=1)
            assert routed.decisions[0].weights.keys() <= {"narrow"}
            mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(2, 1)], dim=-1)
            step = {"input_ids": expected[0][:, :1], "attention_mask": mask, "past_key_values": output.past_key_values}
            torch.testing.assert_close(tiny_base.model(**step).logits[:, -1], expected[1][:, 1], rtol=1e-4, atol=2e-4)
            assert [d.expert for d in call.decisions] == [d.expert for d in decisions]
            del output, step
            gc.collect()
            routed.load(other)
            linears = [m for m in tiny_base.model.modules() if isinstance(m, RoutedLinear)]
            assert [linear.path for linear in linears] == routed.paths == list(narrow.adapters)


def test_pools_are_swapped_while_threads_ask(tiny_base, known_pool, mixed):
    rows, _ = mixed
    pools = [known_pool, known_pool.remove("speaker"), known_pool.routed_by(kind="token")]
    expected = []
    with attached(tiny_base, known_pool) as routed:
        for pool in pools:
            routed.load(pool)
            expected.append([(answer(tiny_base, row), *rounded(routed.decisions)) for row in rows])
        done = threading.Event()

        def swap() -> None:
            for number in range(10**6):
                if done.is_set():
                    return
                routed.load(pools[number % len(pools)])

        def ask_one(number: int) -> bool:
            row = number % len(rows)
            with routed.call() as call:
                text = answer(tiny_base, rows[row])
                pool = pools.index(call.routers.pool)
            (decision,) = call.decisions
            return (text, decision.expert, decision.weights) == expected[pool][row]

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            assert all(at_once(ask_one, 4 * len(rows), threads=4))
        finally:
            done.set()
            swapper.join()


def test_beams_and_several_sequences_share_their_prompts_decision(tiny_base, known_pool, mixed):
    rows, owners = mixed
    for kind in ("prompt", "token", "two_level"):
        with attached(tiny_base, known_pool.routed_by(kind=kind)) as routed, torch.inference_mode():
            batch = batch_of(tiny_base, rows)
            for settings in (
                {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
                {"do_sample": True, "num_return_sequences": 3},
            ):
                with routed.call() as call:
                    together = tiny_base.model.generate(**batch, max_new_tokens=TOKENS, **settings)
                assert [d.expert for d in call.decisions] == [owner for owner in owners for _ in range(3)]
                assert len(together) == 3 * len(rows)
            beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": TOKENS}
            together = tiny_base.model.generate(**batch, **beams)
            for i, (row, owner) in enumerate(zip(rows, owners, strict=True)):
                with routed.forced(owner):
                    alone = tiny_base.model.generate(**batch_of(tiny_base, [row]), **beams)
                text = tiny_base.processor.tokenizer.batch_decode([together[i], alone[0]], skip_special_tokens=True)
                assert kind == "token" or text[0] == text[1]


def test_every_kind_of_cache_carries_the_call(tiny_base, known_pool, mixed):
    rows, _ = mixed
    config = tiny_base.model.config.get_text_config()
    with attached(tiny_base, known_pool.routed_by(kind="token")) as routed, torch.inference_mode():
        expected = generate(tiny_base, rows, tokens=TOKENS)
        decisions = routed.decisions
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=128)):
            batch = batch_of(tiny_base, rows)
            for _ in range(2):  # a cache that was emptied begins another call
                output = tiny_base.model.generate(
                    **batch, past_key_values=cache, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
                )
                assert output[:, -TOKENS:].equal(expected[0])
                assert routed.decisions == decisions
                cache.reset()


def test_a_copy_of_a_cache_goes_on_as_the_first(tiny_base, known_pool, mixed):
    """As when a long prompt is read once for several answers."""
    (row,) = mixed[0][:1]
    with attached(tiny_base, known_pool) as routed, torch.inference_mode():
        batch = batch_of(tiny_base, [row])
        expected = generate(tiny_base, [row], tokens=2)
        first = tiny_base.model(**batch, use_cache=True).past_key_values
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(1, 1)], dim=-1)
        for cache in (copy.deepcopy(first), first):
            generate(tiny_base, prompts(tiny_base.processor, GENERAL, 1), tokens=1)
            step = {"input_ids": expected[0][:, :1], "attention_mask": mask, "past_key_values": cache}
            torch.testing.assert_close(tiny_base.model(**step).logits[:, -1], expected[1][:, 1], rtol=1e-4, atol=2e-4)
        assert routed.pool is known_pool


def test_a_cache_that_was_filled_elsewhere_is_refused(tiny_base, known_pool, mixed):
    batch = batch_of(tiny_base, mixed[0][:1])
    step = {"input_ids": batch["input_ids"][:, -1:]}
    with torch.inference_mode():
        plain = tiny_base.model(**batch, use_cache=True).past_key_values
        with attached(tiny_base, known_pool):
            other = tiny_base.model(**batch, use_cache=True).past_key_values
        with attached(tiny_base, known_pool):
            for cache in (plain, other):
                with pytest.raises(PoolError, match="was not read with this pool attached"):
                    tiny_base.model(**step, past_key_values=cache)


def test_a_forced_expert_that_another_thread_took_away_is_named(tiny_base, known_pool, mixed):
    with attached(tiny_base, known_pool) as routed, routed.forced("speaker"):
        threading.Thread(target=routed.load, args=(known_pool.remove("speaker"),)).start()
        while "speaker" in routed.pool.names:
            pass
        with pytest.raises(PoolError, match="'speaker' is forced, and the pool that was loaded since does not have it"):
            answer(tiny_base, mixed[0][0])


def test_nothing_of_a_call_outlives_its_cache(tiny_base, known_pool, mixed):
    """What a server keeps of each thread's last call is small: the decision, not the pool's stacked experts."""
    with attached(tiny_base, known_pool) as routed:
        assert at_once(lambda number: bool(answer(tiny_base, mixed[0][number])) or True, THREADS)
        answer(tiny_base, mixed[0][0])
        routed.load(known_pool.remove("reader"))
        gc.collect()
        assert len(routed._versions) == 1
        assert routed.current.running is None


def test_an_idle_thread_does_not_keep_the_pool_of_its_last_call(tiny_base, known_pool, mixed):
    with attached(tiny_base, known_pool.remove("reader")) as routed:
        before = weakref.ref(routed._loaded[0])
        asked, done, actual = threading.Barrier(3), threading.Event(), []

        def ask_and_wait(*, inside: bool) -> None:
            if inside:
                with routed.call() as call:
                    answer(tiny_base, mixed[0][0])
                assert call.routers is not None
            else:
                tiny_base.model(**batch_of(tiny_base, mixed[0][:1]), use_cache=False)  # as in training, with gradients
            asked.wait()
            done.wait()
            actual.append([decision.expert for decision in routed.decisions])

        threads = [threading.Thread(target=ask_and_wait, kwargs={"inside": inside}) for inside in (True, False)]
        for thread in threads:
            thread.start()
        asked.wait()
        routed.load(known_pool)
        gc.collect()
        try:
            assert before() is None
            assert len(routed._versions) == 1
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert actual[0] == actual[1]
        assert len(actual[0]) == 1


def test_an_offloaded_linear_is_refused_by_name(tiny_base, known_pool):
    path = "model.language_model.layers.2.mlp.down_proj"
    linear = tiny_base.model.get_submodule(path)
    tiny_base.model.set_submodule(path, nn.Linear(linear.in_features, linear.out_features, device="meta"))
    try:
        with pytest.raises(
            PoolError, match=r"layers\.2\.mlp\.down_proj is not in memory .* load the base onto devices"
        ):
            RoutedModel(tiny_base.model, known_pool)
        assert not any(isinstance(module, RoutedLinear) for module in tiny_base.model.modules())
    finally:
        tiny_base.model.set_submodule(path, linear)


def test_experts_follow_a_base_that_is_moved(tiny_folder, known_pool, mixed):
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    with attached(base, known_pool) as routed, torch.inference_mode():
        rows, owners = mixed
        base.model.to(torch.float64)
        generate(base, rows, tokens=1)
        assert [decision.expert for decision in routed.decisions] == owners
        assert {e.down_SD.dtype for e in routed._loaded[1].loaded.by_path.values()} == {torch.float64}


def test_layers_of_a_base_on_several_devices(tiny_folder, tiny_base, known_pool, mixed):
    """As accelerate runs it: every layer's inputs are moved to where the layer is."""
    base = load_base(BaseModelConfig(path=str(tiny_folder)))
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(4)}
    rest = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    language = {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    dispatch_model(base.model, layers | language | dict.fromkeys(rest, "cpu"), main_device="cpu", force_hooks=True)
    for settings in EVERY_ROUTER:
        with attached(tiny_base, known_pool.routed_by(**settings)) as routed:
            expected, decisions = generate(tiny_base, mixed[0]), routed.decisions
        with attached(base, known_pool.routed_by(**settings)) as routed:
            assert_same(generate(base, mixed[0]), expected)
            assert [d.expert for d in routed.decisions] == [d.expert for d in decisions]
