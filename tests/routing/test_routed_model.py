"""A pool attached to the tiny base: whole-model invariants."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from torch import nn

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.bases import load_base
from pipeline.models.encoding import collate
from pipeline.models.generation import generate_answers
from pipeline.routing import Decision, Expert, Pool, PoolError, PromptStatistics, RoutedModel
from pipeline.routing.call import router_of
from pipeline.routing.features import project_prompts
from pipeline.routing.null import components
from pipeline.routing.routed_linear import RoutedLinear, Running
from pipeline.routing.routes import PromptRoute, RoutingState
from tests.helpers import (
    CLAIMS,
    ask,
    assert_same,
    attached,
    batch_of,
    checksum,
    claimed_prompts,
    features_of,
    generate,
    make_expert,
    prompts,
)

TOKENS = 4
KINDS = ["prompt", "token", "two_level"]


@pytest.fixture(scope="module")
def pool(known_pool) -> Pool:
    """Three experts of different ranks, of whom only prompts are known: no Linear hears anything."""
    experts = [dataclasses.replace(expert, layer_statistics={}) for expert in known_pool.experts.values()]
    return Pool(known_pool.base_label, known_pool.base_fingerprint, known_pool.router, experts, known_pool.null)


@pytest.fixture(scope="module")
def mixed(tiny_base):
    """New prompts of all families, of different lengths, with and without images; with who should answer them."""
    return claimed_prompts(tiny_base)


def hooks_of(model: nn.Module) -> list[tuple[str, int, int]]:
    """Counts the hooks on every module."""
    return [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]


def one_hot(experts: list[str | None]) -> list[Decision]:
    return [Decision(name, {name: 1.0} if name else {}) for name in experts]


def test_every_prompt_goes_to_its_expert_and_base_prompts_to_the_base(tiny_base, pool, mixed):
    rows, owners = mixed
    plain = generate(tiny_base, rows)
    with attached(tiny_base, pool) as routed:
        actual = generate(tiny_base, rows)
        assert routed.decisions == one_hot(owners)
    for i, owner in enumerate(owners):
        changed = not torch.allclose(actual[1][i], plain[1][i], atol=1e-2)
        assert changed is (owner is not None)


def test_a_decision_of_the_prompt_router_has_its_posterior(tiny_base, pool, mixed):
    """Also where the base answers; none where the caller or the Linears decide."""
    rows, owners = mixed
    with attached(tiny_base, pool) as routed:
        generate(tiny_base, rows, tokens=1)
        experts_B1, log_posterior_B1 = routed.last.routers.prompts.rank_candidates(routed.last.features_BF, 1)
        names = [None if e < 0 else pool.names[e] for e in experts_B1[:, 0].tolist()]
        assert [d.expert for d in routed.decisions] == names == owners
        assert [d.posterior for d in routed.decisions] == log_posterior_B1[:, 0].exp().tolist()
        generate(tiny_base, rows[-2:], tokens=1)
        assert all(0.5 < d.posterior <= 1 for d in routed.decisions), "the base alone"
        with routed.forced("reader"):
            generate(tiny_base, rows, tokens=1)
            assert [d.posterior for d in routed.decisions] == [None] * len(rows)
    with attached(tiny_base, pool.routed_by(kind="token")) as routed:
        generate(tiny_base, rows, tokens=1)
        assert [d.posterior for d in routed.decisions] == [None] * len(rows)


def test_a_base_prompt_is_answered_by_the_base_alone(tiny_base, pool, mixed):
    rows = mixed[0][-2:]
    plain = generate(tiny_base, rows)
    with attached(tiny_base, pool):
        actual = generate(tiny_base, rows)
    assert actual[0].equal(plain[0])
    assert actual[1].equal(plain[1])


def test_without_base_prompts_far_ones_go_to_the_base(tiny_base, pool, mixed):
    rows, owners = mixed
    for name in ("reader", "speaker"):
        without_null = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [pool.experts[name]])
        with attached(tiny_base, without_null) as routed:
            generate(tiny_base, [rows[0], rows[2], rows[3]], tokens=1)
            assert routed.decisions == one_hot([owners[i] if owners[i] == name else None for i in (0, 2, 3)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_answered_the_same_in_a_batch_and_alone(tiny_base, pool, mixed, kind):
    rows, _ = mixed
    with attached(tiny_base, pool.routed_by(kind=kind)) as routed:
        together = generate(tiny_base, rows)
        decisions = routed.decisions
        for i, row in enumerate(rows):
            alone = generate(tiny_base, [row])
            assert_same((together[0][i : i + 1], together[1][i : i + 1]), alone)
            assert routed.decisions[0].expert == decisions[i].expert
            assert routed.decisions[0].weights == pytest.approx(decisions[i].weights, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(tiny_base, pool, mixed, kind):
    with attached(tiny_base, pool.routed_by(kind=kind)):
        assert_same(generate(tiny_base, mixed[0]), generate(tiny_base, mixed[0], use_cache=False))


def test_the_prompts_decision_holds_while_the_answer_is_generated(tiny_base, pool, mixed):
    """With every step the language model runs once more, with the very weights chosen at prefill."""
    rows, owners = mixed
    seen = []
    with attached(tiny_base, pool) as routed:
        hook = tiny_base.model.model.language_model.register_forward_hook(
            lambda module, args, output: seen.append(routed.current.running.state.route)
        )
        generate(tiny_base, rows, tokens=TOKENS)
        hook.remove()
        assert len(seen) == TOKENS
        assert all(route is seen[0] for route in seen)
        assert routed.decisions == one_hot(owners)


def test_a_second_batch_is_decided_anew(tiny_base, pool, mixed):
    rows, owners = mixed
    with attached(tiny_base, pool) as routed:
        generate(tiny_base, rows, tokens=2)
        generate(tiny_base, rows[2:3], tokens=2)
        assert routed.decisions == one_hot(owners[2:3])


def test_the_token_router_says_who_took_part(tiny_base, pool, mixed):
    rows, _ = mixed
    with attached(tiny_base, pool.routed_by(kind="token", top_k=2)) as routed:
        assert routed.decisions == []
        generate(tiny_base, rows, tokens=2)
        for decision in routed.decisions:
            assert sum(decision.weights.values()) == pytest.approx(1, abs=1e-5)
            assert decision.expert == max(decision.weights, key=decision.weights.__getitem__)


@pytest.mark.parametrize("kind", KINDS)
def test_forced_prompts_go_to_one_expert_or_to_the_base(tiny_base, pool, mixed, kind):
    rows, _ = mixed
    plain = generate(tiny_base, rows)
    with attached(tiny_base, pool.routed_by(kind=kind)) as routed:
        free = generate(tiny_base, rows)
        with routed.forced("speaker"):
            speaker = generate(tiny_base, rows)
            assert routed.decisions == one_hot(["speaker"] * len(rows))
        with routed.forced(None):
            actual = generate(tiny_base, rows)
            assert routed.decisions == one_hot([None] * len(rows))
        assert_same(actual, plain)
        assert_same(generate(tiny_base, rows), free)
    with attached(tiny_base, pool.remove("reader").remove("painter").routed_by(kind="token")):
        assert_same(generate(tiny_base, rows), speaker)


def test_forcing_an_unknown_expert_names_the_known_ones(tiny_base, pool):
    with (
        attached(tiny_base, pool) as routed,
        pytest.raises(PoolError, match="no expert 'nobody' in the pool; there are: reader, speaker, painter"),
        routed.forced("nobody"),
    ):
        pass


def test_an_error_inside_forced_ends_the_force(tiny_base, pool, mixed):
    rows, owners = mixed
    with attached(tiny_base, pool) as routed:
        with pytest.raises(KeyError), routed.forced("speaker"):
            raise KeyError
        generate(tiny_base, rows, tokens=1)
        assert routed.decisions == one_hot(owners)


@pytest.fixture(scope="module")
def peft_logits(tiny_folder, tiny_base, pool, mixed, tmp_path_factory):
    """What stock PEFT answers with the folders of `reader` and `painter`."""
    logits = {}
    for name in ("reader", "painter"):
        folder = pool.experts[name].save(tmp_path_factory.mktemp("experts") / name)
        base = load_base(BaseModelConfig(path=str(tiny_folder)))
        peft = PeftModel.from_pretrained(base.model, folder).eval()
        with torch.inference_mode():
            logits[name] = peft(**batch_of(tiny_base, mixed[0])).logits
    return logits


@pytest.mark.parametrize("name", ["reader", "painter"])
def test_a_pool_of_one_is_stock_peft(tiny_base, pool, mixed, peft_logits, name):
    batch = batch_of(tiny_base, mixed[0])
    alone = Pool("tiny", tiny_base.fingerprint, RouterConfig(kind="token"), [pool.experts[name]])
    with attached(tiny_base, alone), torch.inference_mode():
        token = tiny_base.model(**batch).logits
    with attached(tiny_base, alone.routed_by(kind="prompt")) as routed, routed.forced(name), torch.inference_mode():
        row = tiny_base.model(**batch).logits
    with attached(tiny_base, pool) as routed, routed.forced(name), torch.inference_mode():
        among_others = tiny_base.model(**batch).logits
    real = batch["attention_mask"].bool()
    for logits in (token, row, among_others):
        torch.testing.assert_close(logits[real], peft_logits[name][real], rtol=1e-4, atol=2e-4)


def test_a_gate_half_open_everywhere_is_half_of_both_worlds(tiny_base, pool):
    """The forward pass is linear in the weight of an expert's update at one Linear."""
    expert = pool.experts["reader"]
    (path, adapter), *_ = expert.adapters.items()
    linear = tiny_base.model.get_submodule(path)
    one = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [expert])
    x_BTD = torch.randn(1, 3, linear.in_features)
    with attached(tiny_base, one) as routed:
        module = tiny_base.model.get_submodule(path)
        state = RoutingState(1, PromptRoute(torch.tensor([[0]]), torch.tensor([[0.5]])))
        routed.current.running = Running(state, routed._loaded[1].loaded, routed.current)
        half = module(x_BTD)
    expected = linear(x_BTD) + 0.5 * adapter.scaling * x_BTD @ adapter.a_RD.T @ adapter.b_OR.T
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_pool_is_the_base(tiny_base, pool, mixed, kind):
    rows, _ = mixed
    plain = generate(tiny_base, rows)
    for null in ((), pool.null):
        empty = Pool("tiny", tiny_base.fingerprint, RouterConfig(kind=kind), [], null)
        with attached(tiny_base, empty) as routed:
            actual = generate(tiny_base, rows)
            assert actual[0].equal(plain[0])
            assert actual[1].equal(plain[1])
            assert routed.decisions == one_hot([None] * len(rows))
            with routed.forced(None):
                assert generate(tiny_base, rows)[1].equal(plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_never_changed(tiny_base, pool, mixed, kind):
    model, rows = tiny_base.model, mixed[0]
    generate(tiny_base, rows)  # transformers puts hooks of its own on the model at the first run
    before = checksum(model)
    modules, keys, hooks = dict(model.named_modules()), list(model.state_dict()), hooks_of(model)
    with attached(tiny_base, pool.routed_by(kind=kind)):
        assert checksum(model) == before
        assert sum(isinstance(module, RoutedLinear) for module in model.modules()) == 4 * 7
        generate(tiny_base, rows)
        assert checksum(model) == before
    assert checksum(model) == before
    assert list(model.state_dict()) == keys
    assert all(module is modules[name] for name, module in model.named_modules())
    assert hooks_of(model) == hooks


def test_after_detaching_the_base_answers_as_before(tiny_base, pool, mixed):
    plain = generate(tiny_base, mixed[0])
    for _ in range(2):
        with attached(tiny_base, pool):
            generate(tiny_base, mixed[0])
    actual = generate(tiny_base, mixed[0])
    assert actual[1].equal(plain[1])


def test_a_second_pool_is_refused_and_leaves_the_first_in_place(tiny_base, pool, mixed):
    rows, owners = mixed
    narrow = make_expert(tiny_base, "narrow", targets=r"model\.language_model\.layers\.3\.mlp\.up_proj")
    wide = Pool("tiny", tiny_base.fingerprint, RouterConfig(), pool.experts.values())
    before = dict(tiny_base.model.named_modules())
    first = Pool("tiny", tiny_base.fingerprint, RouterConfig(kind="token"), [narrow])
    with attached(tiny_base, first):
        expected = generate(tiny_base, rows)
        with pytest.raises(PoolError, match=r"layers\.3\.mlp\.up_proj is RoutedLinear, not a Linear; is another pool"):
            RoutedModel(tiny_base.model, wide)
        assert generate(tiny_base, rows)[1].equal(expected[1])
    assert all(module is before[name] for name, module in tiny_base.model.named_modules())


def test_removing_an_expert_routes_as_if_it_had_never_been_there(tiny_base, pool, mixed):
    rows, _ = mixed
    others = [pool.experts[name] for name in ("reader", "painter")]
    never = Pool("tiny", tiny_base.fingerprint, RouterConfig(), others, pool.null)
    with attached(tiny_base, never) as routed:
        expected, decisions = generate(tiny_base, rows), routed.decisions
    with attached(tiny_base, pool.remove("speaker")) as routed:
        actual = generate(tiny_base, rows)
        assert routed.decisions == decisions
    assert actual[1].equal(expected[1])


def test_the_order_of_arrival_does_not_matter(tiny_base, pool, mixed):
    rows, owners = mixed
    backwards = Pool("tiny", tiny_base.fingerprint, RouterConfig(), reversed(list(pool.experts.values())), pool.null)
    with attached(tiny_base, pool):
        expected = generate(tiny_base, rows)
    with attached(tiny_base, backwards) as routed:
        assert_same(generate(tiny_base, rows), expected)
        assert routed.decisions == one_hot(owners)


def test_a_saved_pool_routes_the_same(tiny_base, pool, mixed, tmp_path):
    loaded = Pool.load(pool.save(tmp_path / "pool"))
    with attached(tiny_base, pool):
        expected = generate(tiny_base, mixed[0])
    with attached(tiny_base, loaded):
        assert generate(tiny_base, mixed[0])[1].equal(expected[1])


def test_projected_features_route_as_well(tiny_base, pool, mixed):
    rows, _ = mixed

    def narrow(expert: Expert, family: str) -> Expert:
        features = project_prompts(features_of(tiny_base, prompts(tiny_base.processor, family, 24)), 96)
        return Expert(
            expert.card, expert.adapter_config, expert.adapters, expert.vectors, PromptStatistics.of(features)
        )

    experts = [narrow(pool.experts[name], family) for name, family in CLAIMS.items()]
    general = project_prompts(features_of(tiny_base, prompts(tiny_base.processor, "direction", 24)), 96)
    projected = Pool("tiny", tiny_base.fingerprint, RouterConfig(feature_width=96), experts, components(general, 2))
    route = router_of(projected).route(project_prompts(features_of(tiny_base, rows), 96))
    choices = route.experts_BM[:, 0].tolist()
    with attached(tiny_base, projected) as routed:
        generate(tiny_base, rows, tokens=1)
        assert routed.decisions == one_hot([None if c < 0 else [*CLAIMS][c] for c in choices])
    assert len(set(choices)) == 4


def test_embeddings_instead_of_ids_are_refused(tiny_base, pool):
    embeds = torch.zeros(1, 4, tiny_base.width)
    with attached(tiny_base, pool), pytest.raises(PoolError, match="routing needs input_ids"):
        tiny_base.model(inputs_embeds=embeds)


def test_the_answer_of_a_training_row_does_not_decide(tiny_base, pool):
    """Prompt and answer in one row, as in the router stage, with the mask that the labels give."""
    row = ask(tiny_base.processor, "repeat : red blue", answer="red blue")
    batch = collate([row], pad_token_id=0)
    with attached(tiny_base, pool) as routed, torch.inference_mode():
        labels = batch.pop("labels")
        routed._reader.prompt_mask = labels == -100
        tiny_base.model(**batch)
        assert routed.decisions == one_hot(["speaker"])


def test_generated_texts_are_the_experts_own(tiny_base, pool, mixed):
    rows, owners = mixed
    with attached(tiny_base, pool) as routed:
        answers = generate_answers(tiny_base.model, tiny_base.processor, rows, max_new_tokens=TOKENS)
        for owner in (*CLAIMS, None):
            with routed.forced(owner):
                forced = generate_answers(tiny_base.model, tiny_base.processor, rows, max_new_tokens=TOKENS)
            mine = [i for i, name in enumerate(owners) if name == owner]
            assert [answers[i] for i in mine] == [forced[i] for i in mine]


def test_vision_tower_and_projector_are_never_adapted(tiny_base, pool):
    with attached(tiny_base, pool):
        routed = [name for name, module in tiny_base.model.named_modules() if isinstance(module, RoutedLinear)]
        assert all(name.startswith("model.language_model.") for name in routed)
        assert isinstance(tiny_base.model.lm_head, nn.Linear)
