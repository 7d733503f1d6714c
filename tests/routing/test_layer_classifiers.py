"""What Linears hear: solved from statistics, added up through the depth; and how the statistics are read."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pipeline.config import RouterConfig
from pipeline.routing import Pool, PromptStatistics
from pipeline.routing.features import project
from pipeline.routing.gaussian import solve
from pipeline.routing.layer_classifiers import (
    WIDTH,
    LayerClassifier,
    LayerInputHook,
    add_log_likelihood,
    layer_classifiers,
    pooled,
)
from pipeline.routing.prompt_hooks import PromptFeatureHook
from tests.helpers import (
    CLAIMS,
    attached,
    batch_of,
    claimed_prompts,
    generate,
    language_linears,
    make_expert,
    prompts,
    samples_of,
)

B, T, NARROW, WIDE, EXPERTS = 5, 7, 12, 100, 3
WIDTHS = {"query": NARROW, "key": NARROW, "gate": NARROW, "up": NARROW, "down": WIDE}
"""Linears in the model's order: `key` has the input of `query`, `up` that of `gate`; `down` is projected."""
CLASSES = EXPERTS + 1


def random(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(number * 100**place for place, number in enumerate(seed)))


def samples(owner: int, path: str, count: int = 40) -> Tensor:
    """Pooled inputs of one owner's prompts at one Linear (N, D)."""
    place, width = list(WIDTHS).index(path), WIDTHS[path]
    return torch.randn(width, generator=random(owner, place)) + torch.randn(
        count, width, generator=random(owner, place, 1)
    )


def statistics(owner: int, paths: tuple[str, ...] = ("query", "gate", "down")) -> dict[str, PromptStatistics]:
    """What an expert (or, as the last owner, the null expert) knows."""
    return {path: PromptStatistics.of(project(samples(owner, path), min(WIDTHS[path], WIDTH))) for path in paths}


KNOWN, NULL = [statistics(owner) for owner in range(EXPERTS)], statistics(EXPERTS)


def hear(experts=KNOWN, null=NULL, shrinkage: float = 0.05) -> dict[str, LayerClassifier]:
    return layer_classifiers(list(WIDTHS), experts, null, WIDTHS, order=list(WIDTHS), shrinkage=shrinkage)


def observed(classifier: LayerClassifier, x_BD: Tensor, classes: int = CLASSES) -> Tensor:
    """Returns a Linear's own contribution for inputs that are the same at every token (B, X)."""
    return add_log_likelihood(classifier, None, x_BD.unsqueeze(1).expand(-1, T, -1), torch.ones(len(x_BD), T), classes)


def centred(scores_BC: Tensor) -> Tensor:
    return (scores_BC - scores_BC.mean(-1, keepdim=True)).float()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_pooling_counts_real_tokens_only(kind):
    x_BTD = torch.randn(B, T, NARROW, generator=random(1))
    tokens_BT = torch.ones(B, T)
    tokens_BT[0, :3] = tokens_BT[1, 5:] = 0
    tokens_BT[2, 2:4] = 0
    expected_BD = torch.stack([x_TD[real_T.bool()].mean(0) for x_TD, real_T in zip(x_BTD, tokens_BT, strict=True)])
    x_BTD[tokens_BT == 0] = 1e4
    torch.testing.assert_close(pooled(x_BTD, tokens_BT.to(kind)), expected_BD)


def test_pooling_ends_in_float32():
    x_BTD = torch.randn(B, T, NARROW, generator=random(1))
    half = pooled(x_BTD.bfloat16(), torch.ones(B, T))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, x_BTD.mean(1), rtol=0.02, atol=0.02)


def test_a_row_without_tokens_pools_to_zero():
    assert not pooled(torch.randn(B, T, NARROW), torch.zeros(B, T)).any()


@pytest.mark.parametrize("path", ["query", "gate", "down"])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_a_linear_hears_what_the_closed_form_says_of_its_projected_input(path, shrinkage):
    classifier = hear(shrinkage=shrinkage)[path]
    x_BD = torch.cat([samples(owner, path, 3) for owner in range(CLASSES)])
    weight_CF, bias_C = solve([*(known[path] for known in KNOWN), NULL[path]], shrinkage=shrinkage)
    expected_BC = project(x_BD, min(WIDTHS[path], WIDTH)).double() @ weight_CF.T + bias_C
    assert classifier.classes_C.tolist() == [0, 1, 2, EXPERTS]
    assert classifier.vector_CD.shape == (CLASSES, WIDTHS[path])
    torch.testing.assert_close(observed(classifier, x_BD), centred(expected_BC), rtol=1e-4, atol=1e-3)


def test_linears_that_share_an_input_add_nothing_and_follow_the_one_that_heard_it():
    actual = hear()
    assert list(actual) == list(WIDTHS)
    assert [actual[path].follows for path in WIDTHS] == [None, "query", "query", "gate", "gate"]
    for path in ("key", "up"):
        assert actual[path].classes_C is actual[path].vector_CD is actual[path].bias_C is None
        before_BX = torch.randn(B, CLASSES)
        assert (
            add_log_likelihood(actual[path], before_BX, torch.randn(B, T, NARROW), torch.ones(B, T), CLASSES)
            is before_BX
        )


def test_nothing_is_heard_where_fewer_than_two_are_known():
    for experts, null in (([{}, {}, {}], {}), ([{}, {}, {}], NULL), ([KNOWN[0], {}, {}], {})):
        assert all(classifier == LayerClassifier(None) for classifier in hear(experts, null).values())
    assert not observed(LayerClassifier(None), torch.randn(B, NARROW)).any()


def test_an_expert_without_statistics_is_neither_spoken_for_nor_against():
    actual = hear([KNOWN[0], statistics(1, ("query",)), KNOWN[2]])
    others = hear([KNOWN[0], KNOWN[2]])
    for path in ("gate", "down"):
        x_BD = torch.randn(B, WIDTHS[path])
        own_BX = observed(actual[path], x_BD)
        assert not own_BX[:, 1].any()
        torch.testing.assert_close(own_BX.sum(-1), torch.zeros(B), rtol=0, atol=1e-3)
        torch.testing.assert_close(own_BX[:, [0, 2, 3]], observed(others[path], x_BD, 3), rtol=1e-5, atol=1e-4)
    assert observed(actual["query"], torch.randn(B, NARROW))[:, 1].all()


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_the_order_of_experts_does_not_matter(order):
    first, other = hear(), hear([KNOWN[i] for i in order])
    for path in ("query", "gate", "down"):
        x_BD = samples(0, path, B)
        expected_BX = observed(first[path], x_BD)[:, [*order, EXPERTS]]
        torch.testing.assert_close(observed(other[path], x_BD), expected_BX, rtol=1e-4, atol=1e-3)


def test_an_expert_that_was_removed_was_never_there(tiny_base):
    experts = [make_expert(tiny_base, name) for name in "abc"]
    for expert, known in zip(experts, KNOWN, strict=True):
        expert.layer_statistics.update(known)
    never = Pool("tiny", tiny_base.fingerprint, RouterConfig(), [experts[0], experts[2]], (), NULL)
    removed = Pool("tiny", tiny_base.fingerprint, RouterConfig(), experts, (), NULL).remove("b")
    actual, expected = (
        hear([e.layer_statistics for e in p.experts.values()], p.null_layer_statistics) for p in (removed, never)
    )
    for path in ("query", "gate", "down"):
        assert actual[path].classes_C.equal(expected[path].classes_C)
        assert actual[path].vector_CD.equal(expected[path].vector_CD)
        assert actual[path].bias_C.equal(expected[path].bias_C)


def test_evidence_adds_up(tiny_base):
    classifier, before_BX = hear()["gate"], torch.randn(B, CLASSES, generator=random(4))
    kept_BX, x_BTD = before_BX.clone(), torch.randn(B, T, NARROW, generator=random(5))
    tokens_BT = torch.ones(B, T)
    tokens_BT[0, 2:] = 0
    own_BX = add_log_likelihood(classifier, None, x_BTD, tokens_BT, CLASSES)
    torch.testing.assert_close(add_log_likelihood(classifier, before_BX, x_BTD, tokens_BT, CLASSES), before_BX + own_BX)
    assert before_BX.equal(kept_BX)
    assert add_log_likelihood(classifier, None, x_BTD.bfloat16(), tokens_BT, CLASSES).dtype == torch.float32


def test_a_hearing_moves_as_a_whole():
    for classifier in hear().values():
        moved = classifier.to(torch.device("cpu"))
        assert moved.follows == classifier.follows
        assert (moved.vector_CD is None) == (classifier.vector_CD is None)


@pytest.fixture(scope="module")
def mixed(tiny_base):
    """Prompts of different lengths, with and without images."""
    return claimed_prompts(tiny_base)[0]


DISTINCT = ("q_proj", "o_proj", "gate_proj", "down_proj")


def test_a_reader_finds_the_distinct_inputs(tiny_base, known_pool, mixed):
    """Query, key and value share an input, gate and up as well; the same with experts in place."""
    expected = [path for path in language_linears(tiny_base) if path.endswith(DISTINCT)]
    assert len(expected) == 4 * len(DISTINCT)
    assert list(samples_of(tiny_base, mixed)) == expected
    with attached(tiny_base, known_pool):
        actual = samples_of(tiny_base, mixed)
    assert list(actual) == expected
    assert all(sample.shape == (len(mixed), WIDTH) for sample in actual.values())


def test_a_sample_is_the_projected_mean_of_a_linears_input(tiny_base, mixed):
    path = language_linears(tiny_base)[-1]
    inputs = []
    hook = tiny_base.model.get_submodule(path).register_forward_hook(lambda module, args, output: inputs.append(*args))
    actual = samples_of(tiny_base, mixed)[path]
    hook.remove()
    (x_BTD,) = inputs
    real_BT = batch_of(tiny_base, mixed)["attention_mask"].bool()
    means_BD = torch.stack([x_TD[real_T].mean(0) for x_TD, real_T in zip(x_BTD, real_BT, strict=True)])
    assert means_BD.shape[-1] > WIDTH
    torch.testing.assert_close(actual, project(means_BD, WIDTH), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_batch_mates_change_a_sample(tiny_base, mixed, side):
    together = samples_of(tiny_base, mixed, side)
    for i, row in enumerate(mixed[::3]):
        for path, alone in samples_of(tiny_base, [row]).items():
            torch.testing.assert_close(together[path][3 * i : 3 * i + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_reader_takes_down_prompts_not_answers(tiny_base):
    """One sample a row, however many tokens are generated; nothing before it knows the prompt's tokens or once removed."""
    rows = prompts(tiny_base.processor, "repeat", 3)
    layer_inputs = LayerInputHook(tiny_base.model, language_linears(tiny_base))
    generate(tiny_base, rows, tokens=1)
    assert not layer_inputs.samples
    reader = PromptFeatureHook(tiny_base.model, lambda features, tokens: setattr(layer_inputs, "tokens_BT", tokens))
    generate(tiny_base, rows, tokens=4)
    assert [sample.shape for taken in layer_inputs.samples.values() for sample in taken] == 16 * [(3, WIDTH)]
    layer_inputs.remove()
    generate(tiny_base, rows, tokens=4)
    reader.remove()
    assert {len(taken) for taken in layer_inputs.samples.values()} == {1}


def test_a_linear_hears_the_input_it_shares_with_one_that_is_not_routed():
    actual = layer_classifiers(["key", "up"], KNOWN, NULL, WIDTHS, order=list(WIDTHS), shrinkage=0.05)
    whole = hear()
    for path, first in (("key", "query"), ("up", "gate")):
        assert actual[path].vector_CD.equal(whole[first].vector_CD)
        assert actual[path].bias_C.equal(whole[first].bias_C)
    assert (actual["key"].follows, actual["up"].follows) == (None, "key")


@pytest.mark.parametrize("adapted", ["k_proj|v_proj", "up_proj"])
def test_tokens_find_their_expert_by_inputs_that_are_shared(tiny_base, known_pool, adapted):
    targets = rf"model\.language_model\.layers\.\d+\..*\.({adapted})"
    experts = []
    for seed, (name, family) in enumerate(CLAIMS.items()):
        expert = make_expert(tiny_base, name, rank=2, seed=seed, targets=targets)
        faint = {path: dataclasses.replace(adapter, scaling=1e-3) for path, adapter in expert.adapters.items()}
        seen = samples_of(tiny_base, prompts(tiny_base.processor, family, 48))
        layer_statistics = {path: PromptStatistics.of(sample) for path, sample in seen.items()}
        experts.append(dataclasses.replace(expert, adapters=faint, layer_statistics=layer_statistics))
    router = RouterConfig(kind="token")
    pool = Pool("tiny", tiny_base.fingerprint, router, experts, known_pool.null, known_pool.null_layer_statistics)
    rows, owners = claimed_prompts(tiny_base, 3)
    with attached(tiny_base, pool) as routed:
        generate(tiny_base, rows, tokens=1)
        right = [decision.expert == owner for decision, owner in zip(routed.decisions, owners, strict=True)]
    assert sum(right) >= 0.8 * len(rows), right  # deaf Linears: a quarter
