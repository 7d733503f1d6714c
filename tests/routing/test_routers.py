"""All routers on the tiny base, with evidence as training reads it: who answers, pools swapped, other ways to run."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.bases import load_base
from pipeline.routing import Pool, PoolError, RoutedModel
from pipeline.routing.adapters import Adapter
from pipeline.routing.routed_linear import RoutedLinear
from pipeline.routing.routes import NULL_EXPERT, LayerRoute, PromptRoute
from tests.helpers import (
    assert_same,
    attached,
    batch_of,
    checksum,
    claimed_prompts,
    generate,
    make_expert,
    prompts,
    statistics_features,
)

TOKENS = 4
ROUTERS = {
    "prompt": {"kind": "prompt"},
    "token": {"kind": "token"},
    "published": {"kind": "token", "token_scores": "phatgoose"},
    "two_level": {"kind": "two_level"},
}
KNOWING = ["prompt", "token", "two_level"]
"""The routers that statistics tell whose prompt it is; the vectors of these experts were never trained."""

every_router = pytest.mark.parametrize("settings", ROUTERS.values(), ids=list(ROUTERS))


@pytest.fixture(scope="module")
def mixed(tiny_base):
    """New prompts of all families, of different lengths, with and without images; with who should answer them."""
    return claimed_prompts(tiny_base, 3)


def blurred(pool: Pool, *names: str | None) -> Pool:
    """Returns a two-level pool in which these experts (None: the null expert) have the same prompt statistics."""
    own = [sum(pool.null[1:], start=pool.null[0]) if name is None else pool.experts[name].statistics for name in names]
    shared = sum(own[1:], start=own[0])
    experts = [
        dataclasses.replace(expert, statistics=shared) if name in names else expert
        for name, expert in pool.experts.items()
    ]
    null = (shared,) if None in names else pool.null
    router = RouterConfig(kind="two_level")
    return Pool(pool.base_label, pool.base_fingerprint, router, experts, null, pool.null_layer_statistics)


@pytest.fixture(params=["token", "two_level", "two_level, blurred"])
def pool(request, known_pool) -> Pool:
    """Pools whose Linears hear the prompt; in the last one the prompt alone does not tell reader, speaker and base apart."""
    if request.param.endswith("blurred"):
        return blurred(known_pool, "reader", "speaker", None)
    return known_pool.routed_by(kind=request.param)


def answered(routed: RoutedModel) -> list[str | None]:
    return [decision.expert for decision in routed.decisions]


def test_every_prompt_goes_to_its_expert_and_base_prompts_to_the_base(tiny_base, pool, mixed):
    rows, owners = mixed
    plain = generate(tiny_base, rows)
    with attached(tiny_base, pool) as routed:
        actual = generate(tiny_base, rows)
        assert answered(routed) == owners
        for decision, owner in zip(routed.decisions, owners, strict=True):
            assert sum(decision.weights.values()) <= 1 + 1e-5
            assert 1 - sum(decision.weights.values()) > 0.8 if owner is None else decision.weights[owner] > 0.8
    for i, owner in enumerate(owners):
        changed = not torch.allclose(actual[1][i], plain[1][i], atol=1e-2)
        assert changed or owner is None


def test_where_prompts_look_alike_the_linears_decide(tiny_base, known_pool, mixed):
    rows, owners = mixed
    alike = blurred(known_pool, "reader", "speaker", None)
    with attached(tiny_base, alike) as routed:
        generate(tiny_base, rows, tokens=1)
        assert isinstance(routed.last.state.route, LayerRoute)
        route = routed.last.state.route
        for listed, prior, owner in zip(route.experts_BM.tolist(), route.prior_BM.exp().tolist(), owners, strict=True):
            if owner == "painter":
                assert (listed[0], prior[0]) == (2, pytest.approx(1, abs=1e-3))
            else:
                assert set(listed) == {0, 1, NULL_EXPERT}
                assert prior == pytest.approx([1 / 3] * 3, abs=1e-3)
        assert answered(routed) == owners
    with attached(tiny_base, alike.routed_by(kind="prompt")) as routed:
        generate(tiny_base, rows, tokens=1)
        assert answered(routed) != owners


def test_where_the_prompt_is_clear_both_levels_are_the_prompt_router(tiny_base, known_pool, mixed):
    with attached(tiny_base, known_pool):
        expected = generate(tiny_base, mixed[0])
    with attached(tiny_base, known_pool.routed_by(kind="two_level")) as routed:
        actual = generate(tiny_base, mixed[0])
        assert isinstance(routed.last.state.route, PromptRoute)
        assert not routed.last.state.log_likelihoods
    assert actual[1].equal(expected[1])


def test_a_row_is_answered_the_same_in_a_batch_and_alone(tiny_base, pool, mixed):
    rows = mixed[0][::2]
    with attached(tiny_base, pool) as routed:
        together = generate(tiny_base, rows)
        decisions = routed.decisions
        for i, row in enumerate(rows):
            assert_same((together[0][i : i + 1], together[1][i : i + 1]), generate(tiny_base, [row]))
            (alone,) = routed.decisions
            assert alone.expert == decisions[i].expert
            for name in alone.weights | decisions[i].weights:
                assert alone.weights.get(name, 0) == pytest.approx(decisions[i].weights.get(name, 0), abs=1e-4)


def test_every_linear_keeps_to_what_it_chose_at_prefill(tiny_base, pool, mixed):
    rows, _ = mixed
    steps: list[list[tuple[Tensor, Tensor]]] = []
    with attached(tiny_base, pool) as routed:
        hook = tiny_base.model.model.language_model.register_forward_hook(
            lambda module, args, output: steps.append(
                [routed.current.running.state.cached_choice[path] for path in routed.paths]
            )
        )
        generate(tiny_base, rows, tokens=TOKENS)
        hook.remove()
        decisions = routed.decisions
        generate(tiny_base, rows, tokens=1)
        assert routed.decisions == decisions
    assert len(steps) == TOKENS
    for step in steps[1:]:
        assert all(held is first for held, first in zip(step, steps[0], strict=True))


@pytest.mark.parametrize("kind", ["token", "two_level"])
def test_the_order_of_arrival_does_not_matter(tiny_base, known_pool, mixed, kind):
    pool = blurred(known_pool, "reader", "speaker", None).routed_by(kind=kind)
    backwards = Pool(
        "tiny",
        tiny_base.fingerprint,
        pool.router,
        reversed(list(pool.experts.values())),
        pool.null,
        pool.null_layer_statistics,
    )
    with attached(tiny_base, pool):
        expected = generate(tiny_base, mixed[0])
    with attached(tiny_base, backwards) as routed:
        assert_same(generate(tiny_base, mixed[0]), expected)
        assert answered(routed) == mixed[1]


def test_a_saved_pool_routes_the_same(tiny_base, pool, mixed, tmp_path):
    loaded = Pool.load(pool.save(tmp_path / "pool"))
    with attached(tiny_base, pool):
        expected = generate(tiny_base, mixed[0])
    with attached(tiny_base, loaded) as routed:
        assert_same(generate(tiny_base, mixed[0]), expected)
        assert answered(routed) == mixed[1]


@pytest.fixture(scope="module")
def newcomer(tiny_base):
    """An expert that adapts Linears of one layer only, and has no evidence."""
    features = statistics_features(tiny_base, prompts(tiny_base.processor, "shape", 16))
    return make_expert(
        tiny_base, "newcomer", rank=7, seed=9, targets=r"model\.language_model\.layers\.3\..*_proj", features=features
    )


@every_router
def test_another_pool_at_run_time_is_as_if_it_had_been_the_first(tiny_base, known_pool, newcomer, mixed, settings):
    model, rows = tiny_base.model, [*mixed[0][::3], *prompts(tiny_base.processor, "shape", 1, seed=1)]
    pool = known_pool.routed_by(**settings)
    narrow = Pool("tiny", tiny_base.fingerprint, pool.router, [newcomer])
    stages = {
        "all": pool,
        "one less": pool.remove("speaker"),
        "one more": pool.add(newcomer),
        "another": narrow,
        "none": narrow.remove("newcomer"),
        "all again": pool,
    }
    generate(tiny_base, rows, tokens=1)  # transformers puts hooks of its own on the model at the first run
    before, modules = checksum(model), dict(model.named_modules())
    expected = {}
    for name, stage in stages.items():
        with attached(tiny_base, stage) as routed:
            expected[name] = *generate(tiny_base, rows), routed.decisions
    with attached(tiny_base, pool) as routed:
        for name, stage in stages.items():
            routed.load(stage)
            assert routed.decisions == []
            tokens, logits = generate(tiny_base, rows)
            assert tokens.equal(expected[name][0])
            assert logits.equal(expected[name][1])
            assert routed.decisions == expected[name][2]
            assert checksum(model) == before
            actual = [path for path, module in model.named_modules() if isinstance(module, RoutedLinear)]
            assert set(actual) == {path for expert in stage.experts.values() for path in expert.adapters}
    assert expected["all"][1].equal(expected["all again"][1])
    assert not expected["one less"][1].equal(expected["all"][1])
    assert checksum(model) == before
    assert all(module is modules[name] for name, module in model.named_modules())


def test_a_pool_that_cannot_be_loaded_leaves_the_one_in_force(tiny_base, known_pool, newcomer, mixed):
    path, adapter = "model.language_model.norm", Adapter(torch.ones(1, 128), torch.ones(128, 1), 1.0)
    strange = dataclasses.replace(newcomer, adapters=newcomer.adapters | {path: adapter})
    with attached(tiny_base, known_pool) as routed:
        expected = generate(tiny_base, mixed[0])
        with pytest.raises(PoolError, match=r"model\.language_model\.norm is Qwen2RMSNorm, not a Linear"):
            routed.load(known_pool.add(strange))
        assert routed.pool is known_pool
        assert generate(tiny_base, mixed[0])[1].equal(expected[1])
        assert answered(routed) == mixed[1]


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_computes_the_same(tiny_base, known_pool, mixed):
    """Text only: tracing the vision tower, which nobody adapts, takes seconds."""
    batch = batch_of(tiny_base, mixed[0][3:6])
    with attached(tiny_base, known_pool.routed_by(kind="token")), torch.no_grad():
        expected = tiny_base.model(**batch).logits
        torch.compiler.reset()
        actual = torch.compile(tiny_base.model, backend="eager")(**batch).logits
        torch.compiler.reset()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


@contextmanager
def training(model: nn.Module, **checkpointing: bool) -> Iterator[None]:
    """Puts a model into training mode, its embeddings with gradients."""
    model.train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()


def backward(model: nn.Module, batch: dict[str, Tensor], **checkpointing: bool) -> tuple[Tensor, Tensor]:
    """Runs forward and backward; returns the logits and the gradient of the text's embeddings."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    with training(model, **checkpointing):
        hook = model.get_input_embeddings().register_forward_hook(keep)
        logits = model(**batch, use_cache=False).logits
        logits[batch["attention_mask"].bool()].square().mean().backward()
        hook.remove()
    gradient = seen[0].grad
    assert gradient is not None
    return logits.detach(), gradient


@pytest.mark.parametrize("settings", [*ROUTERS.values(), {"kind": "token", "temperature": 500.0, "top_k": 4}])
def test_gradient_checkpointing_changes_nothing(tiny_base, known_pool, mixed, settings):
    """The last router is so undecided that everybody takes part."""
    batch = batch_of(tiny_base, mixed[0][::2], side="right")
    with attached(tiny_base, known_pool.routed_by(**settings)) as routed:
        logits, gradient = backward(tiny_base.model, batch)
        decisions = routed.decisions
        for reentrant in (False, True):
            again, gradient_again = backward(tiny_base.model, batch, use_reentrant=reentrant)
            assert again.equal(logits)
            assert routed.decisions == decisions
            assert gradient_again.isfinite().all()
            if not reentrant:  # the other kind cuts what flows back through the weights
                torch.testing.assert_close(gradient_again, gradient)
        with torch.no_grad():
            torch.testing.assert_close(tiny_base.model(**batch).logits, logits)
    assert gradient.abs().max() > 0
    assert all(parameter.grad is None for parameter in tiny_base.model.parameters())


@pytest.fixture(scope="module")
def half_base(tiny_folder):
    return load_base(BaseModelConfig(path=str(tiny_folder), dtype="bfloat16"))


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_base_in_half_precision(tiny_base, half_base, known_pool, mixed, router):
    rows, owners = mixed
    pool = known_pool.routed_by(**ROUTERS[router])
    with attached(tiny_base, pool), torch.no_grad():
        exact = tiny_base.model(**batch_of(tiny_base, rows)).logits[:, -1]
    with attached(half_base, pool) as routed, torch.no_grad():
        half = half_base.model(**batch_of(half_base, rows)).logits[:, -1]
        assert half.dtype == torch.bfloat16
        assert answered(routed) == owners or router not in KNOWING
        generate(half_base, rows, tokens=2)
        for experts in routed._loaded[1].loaded.by_path.values():
            assert {experts.down_SD.dtype, experts.up_SO.dtype} == {torch.bfloat16}
    alike_B = torch.cosine_similarity(half.float(), exact, dim=-1)
    assert (alike_B > 0.98).all()


def test_a_blurred_pool_in_half_precision(half_base, known_pool, mixed):
    with attached(half_base, blurred(known_pool, "reader", "speaker", None)) as routed:
        generate(half_base, mixed[0], tokens=2)
        assert isinstance(routed.last.state.route, LayerRoute)
        assert answered(routed) == mixed[1]
