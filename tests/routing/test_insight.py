"""What `explain` says against what the routers did."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pipeline.config import RouterConfig
from pipeline.routing import Pool, PoolError, RoutedModel
from pipeline.routing.insight import Candidate, Explanation, candidates_of_call, explain
from pipeline.routing.prompt_router import CANDIDATES
from tests.helpers import (
    CLAIMS,
    attached,
    batch_of,
    claimed_prompts,
    generate,
    make_expert,
    prompts,
    statistics_features,
)

PHATGOOSE = {"kind": "token", "token_scores": "phatgoose"}
EVERY_ROUTER = [{"kind": "prompt"}, {"kind": "token"}, PHATGOOSE, {"kind": "two_level"}]
LINEARS = 28


@pytest.fixture(scope="module")
def mixed(tiny_base):
    """Prompts of all families, of different lengths, so that most are padded; with who should answer them."""
    return claimed_prompts(tiny_base, 2, seed=3)


@pytest.fixture(scope="module")
def without_null(known_pool) -> Pool:
    """The pool without base prompts."""
    return Pool("tiny", known_pool.base_fingerprint, RouterConfig(), known_pool.experts.values())


def explained(base, pool, rows, side: str = "left", **settings) -> tuple[list[Explanation], RoutedModel]:
    with attached(base, pool) as routed:
        return explain(routed, batch_of(base, rows, side), **settings), routed


def by_name(explanation: Explanation) -> dict[str | None, Candidate]:
    return {candidate.name: candidate for candidate in explanation.candidates}


def lengths(rows) -> list[int]:
    return [len(row.input_ids) for row in rows]


@pytest.mark.parametrize("settings", EVERY_ROUTER)
def test_every_row_has_its_explanation(tiny_base, known_pool, mixed, settings):
    rows, owners = mixed
    actual, routed = explained(tiny_base, known_pool.routed_by(**settings), rows)
    assert [e.decision for e in actual] == routed.decisions
    assert settings == PHATGOOSE or [e.decision.expert for e in actual] == owners
    for explanation in actual:
        assert explanation.experts == tuple(CLAIMS)
        assert set(by_name(explanation)) == {*CLAIMS, None}
        assert len(explanation.candidates) == len(CLAIMS) + 1
        for name, candidate in by_name(explanation).items():
            assert candidate.weight == pytest.approx(
                1 - sum(explanation.decision.weights.values())
                if name is None
                else explanation.decision.weights.get(name, 0.0),
                abs=1e-6,
            )
        assert sum(candidate.weight for candidate in explanation.candidates) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("general", [True, False])
def test_candidates_stand_in_the_order_of_their_posterior(tiny_base, known_pool, without_null, mixed, general):
    for explanation in explained(tiny_base, known_pool if general else without_null, mixed[0])[0]:
        posteriors = [candidate.posterior for candidate in explanation.candidates]
        assert posteriors == sorted(posteriors, reverse=True)
        assert sum(posteriors) == pytest.approx(1, abs=1e-6)
        assert all(0 <= posterior <= 1 for posterior in posteriors)
        assert explanation.candidates[0].name == explanation.decision.expert


def test_scores_are_the_posteriors_logarithms_and_the_best_is_zero(tiny_base, known_pool, mixed):
    for explanation in explained(tiny_base, known_pool, mixed[0])[0]:
        scores = torch.tensor([candidate.score for candidate in explanation.candidates], dtype=torch.float64)
        assert scores.max() == 0
        assert scores.softmax(-1).tolist() == pytest.approx([c.posterior for c in explanation.candidates], abs=1e-9)


def test_without_base_prompts_the_base_has_no_score(tiny_base, without_null, mixed):
    for explanation in explained(tiny_base, without_null, mixed[0])[0]:
        base = by_name(explanation)[None]
        assert (base.score, base.distance, base.threshold, base.inside) == (None, None, None, None)
        assert base.posterior == float(explanation.decision.expert is None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_distance_and_threshold_are_the_statistics_own(tiny_base, without_null, mixed, side):
    features_BF = statistics_features(tiny_base, mixed[0])
    for row, explanation in enumerate(explained(tiny_base, without_null, mixed[0], side)[0]):
        for name, candidate in by_name(explanation).items():
            if name is not None:
                statistics = without_null.experts[name].statistics
                distance = float(statistics.distance(features_BF[row][None], shrinkage=without_null.router.shrinkage))
                assert candidate.distance == pytest.approx(distance, rel=1e-3)
                assert candidate.threshold == statistics.threshold
                assert candidate.inside == (distance <= statistics.threshold)
                assert not candidate.posterior or candidate.inside


def test_few_candidates_are_the_likeliest_and_the_base(tiny_base, known_pool, mixed):
    rows, owners = mixed
    whole = explained(tiny_base, known_pool, rows)[0]
    for few, all_, owner in zip(explained(tiny_base, known_pool, rows, limit=1)[0], whole, owners, strict=True):
        best = next(candidate for candidate in all_.candidates if candidate.name is not None)
        assert set(by_name(few)) == {best.name, None}
        assert owner in by_name(few)


@pytest.mark.parametrize("side", ["left", "right"])
def test_published_weights_are_those_that_were_traced(tiny_base, known_pool, mixed, side):
    rows, _ = mixed
    pool = known_pool.routed_by(**PHATGOOSE)
    actual, _ = explained(tiny_base, pool, rows, side)
    with attached(tiny_base, pool) as routed, torch.inference_mode():
        batch = batch_of(tiny_base, rows, side)
        with routed.call(traced=True) as call:
            tiny_base.model(**batch, use_cache=False)
        traces = call.state.traces
    for row, (explanation, length) in enumerate(zip(actual, lengths(rows), strict=True)):
        assert len(explanation.weights) == LINEARS
        real_T = batch["attention_mask"][row].bool()
        for path, weights_TE in explanation.weights.items():
            assert weights_TE.shape == (length, len(CLAIMS))
            torch.testing.assert_close(weights_TE, traces[path][row, real_T])
            torch.testing.assert_close(weights_TE.sum(-1), torch.ones(length))
        assert_mean_is_the_decision(explanation)


def assert_mean_is_the_decision(explanation: Explanation) -> None:
    mean_E = torch.stack([weights_TE.mean(0) for weights_TE in explanation.weights.values()]).mean(0)
    expected = [explanation.decision.weights.get(name, 0.0) for name in explanation.experts]
    assert mean_E.tolist() == pytest.approx(expected, abs=1e-5)


def same_at_every_token(weights_TE: Tensor) -> bool:
    return bool((weights_TE == weights_TE[0]).all())


@pytest.mark.parametrize("kind", ["prompt", "token", "two_level"])
def test_where_whole_prompts_decide_every_token_has_the_same_weights(tiny_base, known_pool, mixed, kind):
    rows, owners = mixed
    actual, routed = explained(tiny_base, known_pool.routed_by(kind=kind), rows)
    for row, (explanation, owner) in enumerate(zip(actual, owners, strict=True)):
        assert len(explanation.weights) == LINEARS
        for path, weights_TE in explanation.weights.items():
            assert weights_TE.shape == (lengths(rows)[row], len(CLAIMS))
            assert same_at_every_token(weights_TE)
            if kind == "token":
                torch.testing.assert_close(weights_TE[0], routed.last.state.layer_weights[path][row])
            else:
                assert weights_TE[0].tolist() == [float(name == owner) for name in CLAIMS]
        assert_mean_is_the_decision(explanation)


def test_the_reason_names_the_expert_and_the_next(tiny_base, known_pool, mixed):
    for explanation, owner in zip(explained(tiny_base, known_pool, mixed[0])[0], mixed[1], strict=True):
        best, second, *_ = explanation.candidates
        assert explanation.reason == (
            f"{owner or 'the base'}: {best.posterior:.1%} likely, before {second.name or 'the base'} "
            f"with {second.posterior:.1%}"
        )


def test_the_reason_to_abstain_is_the_nearest_task_with_its_distance(tiny_base, without_null, mixed):
    rows, owners = mixed
    *_, explanation = explained(tiny_base, without_null, rows)[0]
    assert owners[-1] is None
    assert explanation.decision.expert is None
    near = min(explanation.candidates[1:], key=lambda c: c.distance / c.threshold)
    assert near.distance > near.threshold
    assert explanation.reason.startswith("the base: beyond the threshold ")
    assert explanation.reason.endswith(f"nearest is {near.name} ({near.distance:.2f} > {near.threshold:.2f})")


def test_a_task_that_was_not_asked_is_no_reason_to_abstain(tiny_base):
    """Only the likeliest tasks are asked for their threshold; another one's may well hold the prompt."""
    likely = statistics_features(tiny_base, prompts(tiny_base.processor, "repeat", 16))
    one_linear = r"model\.language_model\.layers\.0\.mlp\.down_proj"
    experts = [
        make_expert(tiny_base, f"likely{i}", targets=one_linear, features=likely + i / 1000, quantile=0.99)
        for i in range(CANDIDATES)
    ]
    experts = [
        dataclasses.replace(expert, statistics=dataclasses.replace(expert.statistics, threshold=0.01))
        for expert in experts
    ]
    unlikely = statistics_features(tiny_base, prompts(tiny_base.processor, "shape", 16))
    experts.append(make_expert(tiny_base, "unlikely", targets=one_linear, features=unlikely))
    pool = Pool("tiny", tiny_base.fingerprint, RouterConfig(), experts)
    (explanation,) = explained(tiny_base, pool, prompts(tiny_base.processor, "repeat", 1, seed=4))[0]
    assert explanation.decision.expert is None
    assert by_name(explanation)["unlikely"].threshold == math.inf
    assert "nearest is likely" in explanation.reason


def test_the_reason_says_when_tokens_chose_otherwise(tiny_base, known_pool, mixed):
    actual, _ = explained(tiny_base, known_pool.routed_by(**PHATGOOSE), mixed[0])
    for explanation, owner in zip(actual, mixed[1], strict=True):
        who = explanation.decision.expert or "the base"
        assert explanation.reason.startswith(who)
        otherwise = f"by the Linears' own choice: the prompt alone speaks for {owner or 'the base'}"
        assert (otherwise in explanation.reason) is (explanation.decision.expert != owner)
    assert any(explanation.decision.expert != owner for explanation, owner in zip(actual, mixed[1], strict=True))


@pytest.mark.parametrize("kind", ["prompt", "two_level"])
def test_where_an_expert_is_retired_the_base_answers_and_all_others_as_before(tiny_base, known_pool, mixed, kind):
    """The reason says so; every other answer is the same."""
    rows, owners = mixed
    pool = known_pool.routed_by(kind=kind)
    gone = known_pool.names[0]
    with attached(tiny_base, pool) as routed:
        (before, _), decided = generate(tiny_base, rows), routed.decisions
        with routed.forced(None):
            bare, _ = generate(tiny_base, rows)
    with attached(tiny_base, pool.retire(gone)) as routed:
        (after, _), decisions = generate(tiny_base, rows), routed.decisions
    for row, owner in enumerate(owners):
        assert decisions[row].expert == (None if owner == gone else owner)
        assert decisions[row] == decided[row] or owner == gone
        assert after[row].equal((bare if owner == gone else before)[row])
    for explanation, owner in zip(explained(tiny_base, pool.retire(gone), rows)[0], owners, strict=True):
        if owner == gone:
            assert explanation.reason.startswith(f"the base: the prompt is {gone}'s (")
            assert explanation.reason.endswith("likely), which is retired")


def test_one_expert_alone(tiny_base, known_pool, mixed):
    alone = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [known_pool.experts["speaker"]])
    rows, owners = mixed
    for explanation, owner in zip(explained(tiny_base, alone, rows)[0], owners, strict=True):
        assert explanation.decision.expert == (owner if owner == "speaker" else None)
        assert "speaker" in explanation.reason


@pytest.mark.parametrize("settings", EVERY_ROUTER)
def test_whom_the_routers_weighed_is_known_after_any_prompt(tiny_base, known_pool, mixed, settings):
    """Without a second run: the same candidates as those of the explanation."""
    rows, _ = mixed
    with attached(tiny_base, known_pool.routed_by(**settings)) as routed:
        assert candidates_of_call(routed.last) == []
        expected = [explanation.candidates for explanation in explain(routed, batch_of(tiny_base, rows))]
        generate(tiny_base, rows[:1])
        assert len(candidates_of_call(routed.last)) == 1
        generate(tiny_base, rows)
        for actual, candidates in zip(candidates_of_call(routed.last), expected, strict=True):
            assert [c.name for c in actual] == [c.name for c in candidates]
            assert [c.weight for c in actual] == pytest.approx([c.weight for c in candidates], abs=1e-6)
        routed.load(known_pool.remove("reader"))
        assert candidates_of_call(routed.last) == []
        generate(tiny_base, rows)
        assert all(len(actual) == len(CLAIMS) for actual in candidates_of_call(routed.last))


def test_an_empty_pool_has_nothing_to_explain(tiny_base, known_pool, mixed):
    empty = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [], known_pool.null)
    with attached(tiny_base, empty) as routed:
        with pytest.raises(PoolError, match="the pool is empty: the base answers everything"):
            explain(routed, batch_of(tiny_base, mixed[0]))
        generate(tiny_base, mixed[0], tokens=1)
        assert candidates_of_call(routed.last) == []


@pytest.mark.parametrize("settings", EVERY_ROUTER)
def test_explaining_leaves_no_traces_and_changes_no_answer(tiny_base, known_pool, mixed, settings):
    rows, _ = mixed
    with attached(tiny_base, known_pool.routed_by(**settings)) as routed:
        expected = generate(tiny_base, rows)
        explain(routed, batch_of(tiny_base, rows))
        assert generate(tiny_base, rows)[1].equal(expected[1])
        assert routed.last.state.traces is None


def test_an_error_in_the_model_leaves_no_traces_either(tiny_base, known_pool):
    with attached(tiny_base, known_pool) as routed:
        with pytest.raises(PoolError, match="routing needs input_ids"):
            explain(routed, {"inputs_embeds": torch.zeros(1, 4, tiny_base.width)})
        generate(tiny_base, prompts(tiny_base.processor, "repeat", 1), tokens=1)
        assert routed.last.state.traces is None
