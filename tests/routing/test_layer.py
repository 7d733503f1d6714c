"""The routed Linear against the sum it stands for: y = W x + sum_e w_e s_e B_e A_e x."""

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from pipeline.routing.layer import GatedLinear, Route, RoutedLinear, Slot

B, T, D, O, POOL = 3, 5, 24, 16, 4  # noqa: E741 - shape letters
RANKS = {0: 2, 1: 5, 3: 1}
"""Rank by expert; expert 2 of the pool has no adapter for this Linear."""


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_slots(ranks: dict[int, int] = RANKS) -> list[Slot]:
    return [
        Slot(
            expert,
            a_RD=torch.randn(rank, D, generator=random(10 + expert)),
            b_OR=torch.randn(O, rank, generator=random(20 + expert)),
            scaling=0.5 + expert,
            vector_D=torch.randn(D, generator=random(30 + expert)),
        )
        for expert, rank in ranks.items()
    ]


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(D, O).requires_grad_(False)


@pytest.fixture(scope="module")
def x_BTD():
    return torch.randn(B, T, D, generator=random(1)) + 0.5


def naive(linear, slots, x_BTD, weight) -> torch.Tensor:
    """Sums expert by expert and token by token; `weight(b, t, slot)` is w_e."""
    y_BTO = linear(x_BTD)
    for b in range(x_BTD.shape[0]):
        for t in range(x_BTD.shape[1]):
            for i, slot in enumerate(slots):
                y_BTO[b, t] += weight(b, t, i) * slot.scaling * slot.b_OR @ (slot.a_RD @ x_BTD[b, t])
    return y_BTO


def token_weight(slots, x_BTD, top_k, temperature):
    """The published weights, one token at a time."""

    def weight(b, t, i):
        x_D = layer_norm(x_BTD[b, t], (D,), eps=1e-5)
        z_E = torch.stack([x_D @ layer_norm(s.vector_D, (D,), eps=1e-5) for s in slots]) / (D**0.5 * temperature)
        chosen = z_E.argsort(descending=True)[:top_k]
        return z_E[chosen].softmax(0)[chosen == i].sum()

    return weight


def test_row_mode_is_the_weighted_sum(linear, x_BTD):
    slots = make_slots()
    weights_BE = torch.rand(B, POOL, generator=random(2))
    routed = RoutedLinear(linear, slots, Route("row", weights_BE=weights_BE), POOL)
    expected = naive(linear, slots, x_BTD, lambda b, t, i: weights_BE[b, slots[i].expert])
    torch.testing.assert_close(routed(x_BTD), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_token_mode_is_the_weighted_sum(linear, x_BTD, top_k, temperature):
    slots = make_slots()
    routed = RoutedLinear(linear, slots, Route("token", top_k=top_k, temperature=temperature), POOL)
    expected = naive(linear, slots, x_BTD, token_weight(slots, x_BTD, top_k, temperature))
    torch.testing.assert_close(routed(x_BTD), expected, rtol=1e-5, atol=1e-5)


def test_rows_may_go_to_different_experts_or_to_none(linear, x_BTD):
    slots = make_slots()
    weights_BE = torch.zeros(B, POOL)
    weights_BE[0, 1] = weights_BE[1, 3] = 1
    y_BTO = RoutedLinear(linear, slots, Route("row", weights_BE=weights_BE), POOL)(x_BTD)
    for row, slot in ((0, slots[1]), (1, slots[2])):
        alone = linear(x_BTD[row]) + slot.scaling * x_BTD[row] @ slot.a_RD.T @ slot.b_OR.T
        torch.testing.assert_close(y_BTO[row], alone, rtol=1e-5, atol=1e-5)
    assert y_BTO[2].equal(linear(x_BTD)[2])


def test_an_expert_without_this_linear_leaves_it_alone(linear, x_BTD):
    weights_BE = torch.zeros(B, POOL)
    weights_BE[:, 2] = 1
    routed = RoutedLinear(linear, make_slots(), Route("row", weights_BE=weights_BE), POOL)
    assert routed(x_BTD).equal(linear(x_BTD))


def test_without_weights_the_base_answers(linear, x_BTD):
    assert RoutedLinear(linear, make_slots(), Route("row"), POOL)(x_BTD).equal(linear(x_BTD))


def test_one_expert_in_token_mode_is_its_lora(linear, x_BTD):
    (slot,) = make_slots({0: 3})
    lora = linear(x_BTD) + slot.scaling * x_BTD @ slot.a_RD.T @ slot.b_OR.T
    torch.testing.assert_close(RoutedLinear(linear, [slot], Route("token"), 1)(x_BTD), lora, rtol=1e-5, atol=1e-5)


def test_the_base_linear_is_the_same_object_and_nothing_trains(linear):
    routed = RoutedLinear(linear, make_slots(), Route(), POOL)
    assert routed.base is linear
    assert list(routed.state_dict()) == ["base.weight", "base.bias"]
    assert not any(p.requires_grad for p in routed.parameters())


def test_half_precision_stays_half_precision(linear, x_BTD):
    slots = make_slots()
    for route in (Route("token"), Route("row", weights_BE=torch.full((B, POOL), 0.25))):
        exact = RoutedLinear(linear.float(), slots, route, POOL)(x_BTD)
        half = RoutedLinear(linear.bfloat16(), slots, route, POOL)(x_BTD.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.5)


def test_votes_are_mean_weights_over_the_prompts_real_tokens(linear, x_BTD):
    slots = make_slots()
    tokens_BT = torch.ones(B, T)
    tokens_BT[1, :3] = 0
    route = Route("token", top_k=2, tokens_BT=tokens_BT)
    routed = RoutedLinear(linear, slots, route, POOL)
    routed(x_BTD)
    weight = token_weight(slots, x_BTD, 2, 1.0)
    expected_BE = torch.zeros(B, POOL)
    for b in range(B):
        real = [t for t in range(T) if tokens_BT[b, t]]
        for i, slot in enumerate(slots):
            expected_BE[b, slot.expert] = sum(weight(b, t, i) for t in real) / len(real)
    torch.testing.assert_close(route.votes_BE, expected_BE, rtol=1e-5, atol=1e-6)
    routed(x_BTD)
    torch.testing.assert_close(route.votes_BE, 2 * expected_BE, rtol=1e-5, atol=1e-6)
    route.tokens_BT = None  # decoding
    routed(x_BTD[:, -1:])
    torch.testing.assert_close(route.votes_BE, 2 * expected_BE, rtol=1e-5, atol=1e-6)


def test_a_gate_starts_half_open(linear, x_BTD):
    (slot,) = make_slots({0: 3})
    gated = GatedLinear(linear, slot.a_RD, slot.b_OR, slot.scaling)
    expected = linear(x_BTD) + 0.5 * slot.scaling * x_BTD @ slot.a_RD.T @ slot.b_OR.T
    torch.testing.assert_close(gated(x_BTD), expected, rtol=1e-5, atol=1e-5)


def test_a_gate_is_the_sigmoid_of_token_times_vector(linear, x_BTD):
    (slot,) = make_slots({0: 3})
    gated = GatedLinear(linear, slot.a_RD, slot.b_OR, slot.scaling)
    gated.vector.data = slot.vector_D
    gate = torch.sigmoid((x_BTD * slot.vector_D).sum(-1, keepdim=True))
    expected = linear(x_BTD) + gate * slot.scaling * (x_BTD @ slot.a_RD.T @ slot.b_OR.T)
    torch.testing.assert_close(gated(x_BTD), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_vector_alone(linear, x_BTD):
    (slot,) = make_slots({0: 3})
    before = linear.weight.clone()
    gated = GatedLinear(linear, slot.a_RD, slot.b_OR, slot.scaling)
    optimizer = torch.optim.SGD([p for p in gated.parameters() if p.requires_grad], lr=0.1)
    gated(x_BTD).square().mean().backward()
    assert [name for name, p in gated.named_parameters() if p.grad is not None] == ["vector"]
    assert gated.vector.grad.abs().max() > 0
    optimizer.step()
    assert gated.vector.abs().max() > 0
    assert linear.weight.equal(before)
    assert gated.a_RD.equal(slot.a_RD)
    torch.testing.assert_close(gated.b_OR, slot.scaling * slot.b_OR)


def test_an_untrained_lora_gives_its_vector_no_gradient(linear, x_BTD):
    (slot,) = make_slots({0: 3})
    gated = GatedLinear(linear, slot.a_RD, torch.zeros_like(slot.b_OR), slot.scaling)
    gated(x_BTD).square().mean().backward()
    assert not gated.vector.grad.any()
