"""The routed Linear against the sum it stands for: y = W x + sum_e w_e s_e B_e A_e x."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from pipeline.routing import routed_linear as layer
from pipeline.routing.gated_linear import GatedLinear
from pipeline.routing.layer_classifiers import LayerClassifier
from pipeline.routing.routed_linear import Current, LinearExperts, PoolExperts, RoutedLinear, Running, Slot
from pipeline.routing.routes import NULL_EXPERT, BaseOnly, LayerRoute, PromptRoute, Route, RoutingState, TokenRoute

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


def routed(linear, slots, route: Route, classifier: LayerClassifier | None = None, tokens_BT=None) -> RoutedLinear:
    """A routed Linear in a pool of POOL experts, at prefill under this route."""
    module = RoutedLinear(linear, Current([]), "path")
    experts = PoolExperts({"path": LinearExperts.stacked(linear, slots, POOL, classifier)})
    state = RoutingState(POOL, route, torch.ones(B, T) if tokens_BT is None else tokens_BT)
    module.current.running = Running(state, experts, module.current)
    return module


def state_of(module: RoutedLinear) -> RoutingState:
    return module.current.running.state


@pytest.fixture(params=["dense", "sparse"])
def form(request, monkeypatch):
    """Both forms of choosing from the whole pool."""
    if request.param == "sparse":
        monkeypatch.setattr(layer, "DENSE_EXPERTS", 0)


LIST_BM = torch.tensor([[0, NULL_EXPERT, 3], [1, 0, 2], [NULL_EXPERT, 2, 1]])
"""Each row has a list of its own; expert 2 has no adapter here."""


def listed_weight(slots, list_BM, weight):
    """Turns weights of places, `weight(b, t)` (M,), into weights of slots."""

    def of_slot(b, t, i):
        row = list_BM[b if len(list_BM) > 1 else 0]
        return weight(b, t)[row == slots[i].expert].sum()

    return of_slot


@pytest.mark.parametrize("rows", [1, B])
def test_fixed_weights_are_the_weighted_sum(linear, x_BTD, rows):
    slots, list_BM = make_slots(), LIST_BM[:rows]
    weights_BM = torch.rand(rows, 3, generator=random(2))
    actual = routed(linear, slots, PromptRoute(list_BM, weights_BM))(x_BTD)
    expected = naive(linear, slots, x_BTD, listed_weight(slots, list_BM, lambda b, t: weights_BM[min(b, rows - 1)]))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


CLASSIFIER = LayerClassifier(
    None,
    classes_C=torch.tensor([0, 1, POOL]),
    vector_CD=0.1 * torch.randn(3, D, generator=random(5)),
    bias_C=torch.tensor([0.1, -0.2, 0.3]),
)
"""Experts 0 and 1 and the null expert have statistics here, 2 and 3 have none."""


def observed(x_TD: torch.Tensor) -> torch.Tensor:
    """Log-likelihoods of the pool's experts and of the null expert for a prompt (E + 1,), 0 where nothing is known."""
    own_C = CLASSIFIER.vector_CD @ x_TD.mean(0) + CLASSIFIER.bias_C
    return torch.zeros(POOL + 1).index_copy(0, CLASSIFIER.classes_C, own_C - own_C.mean())


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("rows", [1, B])
def test_a_list_is_weighed_by_evidence_and_prior(linear, x_BTD, rows, temperature):
    slots, list_BM = make_slots(), LIST_BM[:rows]
    prior_BM = torch.randn(rows, 3, generator=random(3))

    def weight(b, t):
        row = min(b, rows - 1)
        return (observed(x_BTD[b])[list_BM[row]] / temperature + prior_BM[row]).softmax(0)

    module = routed(linear, slots, LayerRoute(list_BM, prior_BM, 3, temperature), CLASSIFIER)
    actual = module(x_BTD)
    expected = naive(linear, slots, x_BTD, listed_weight(slots, list_BM, weight))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    state_of(module).decode()  # the choice holds, whatever comes
    held = linear(x_BTD[:, :1]) + actual[:, :1] - linear(x_BTD[:, :1])
    torch.testing.assert_close(module(x_BTD[:, :1]), held, rtol=1e-4, atol=1e-4)


def test_only_the_likeliest_of_a_list_have_a_weight(linear, x_BTD):
    everybody = torch.tensor([[0, 1, 2, 3, NULL_EXPERT]])
    route = LayerRoute(everybody, torch.zeros(1, 5), 1)
    module = routed(linear, make_slots(), route, CLASSIFIER)
    module(x_BTD)
    best = [int(observed(x_TD).argmax()) for x_TD in x_BTD]
    expected = torch.zeros(B, POOL + 1)
    expected[range(B), best] = 1
    assert state_of(module).weights_BE.equal(expected[:, :POOL])


def test_evidence_counts_the_prompts_real_tokens_only(linear, x_BTD):
    tokens_BT = torch.ones(B, T)
    tokens_BT[1, :3] = 0
    module = routed(linear, make_slots(), LayerRoute(LIST_BM, torch.zeros(B, 3)), CLASSIFIER, tokens_BT)
    module(x_BTD)
    found_BX = state_of(module).log_likelihoods["path"]
    expected_BX = torch.stack([observed(x_BTD[0]), observed(x_BTD[1, 3:]), observed(x_BTD[2])])
    torch.testing.assert_close(found_BX, expected_BX, rtol=1e-5, atol=1e-5)


def test_evidence_adds_up_through_the_depth(linear, x_BTD):
    """The second Linear only repeats the first one's input; the third hears something new."""
    current = Current([])
    layer_classifiers = {"a": CLASSIFIER, "b": LayerClassifier("a"), "c": dataclasses.replace(CLASSIFIER, follows="a")}
    experts = {path: LinearExperts.stacked(linear, make_slots(), POOL, h) for path, h in layer_classifiers.items()}
    state = RoutingState(POOL, LayerRoute(LIST_BM, torch.zeros(B, 3)), torch.ones(B, T))
    current.running = Running(state, PoolExperts(experts), current)
    modules = [RoutedLinear(linear, current, path) for path in layer_classifiers]
    for module, x in zip(modules, (x_BTD, x_BTD, 2 * x_BTD), strict=True):
        module(x)
        module(x)  # as when a checkpointed layer runs again
    assert state.log_likelihoods["b"].equal(state.log_likelihoods["a"])
    expected_BX = torch.stack([observed(x_TD) + observed(2 * x_TD) for x_TD in x_BTD])
    torch.testing.assert_close(state.log_likelihoods["c"], expected_BX, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_choosing_from_the_whole_pool_is_the_weighted_sum(linear, x_BTD, top_k, temperature, form):
    slots = make_slots()
    actual = routed(linear, slots, TokenRoute(top_k, temperature))(x_BTD)
    expected = naive(linear, slots, x_BTD, token_weight(slots, x_BTD, top_k, temperature))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_may_go_to_different_experts_or_to_none(linear, x_BTD):
    slots = make_slots()
    y_BTO = routed(linear, slots, PromptRoute(torch.tensor([[1], [3], [NULL_EXPERT]]), torch.ones(B, 1)))(x_BTD)
    for row, slot in ((0, slots[1]), (1, slots[2])):
        alone = linear(x_BTD[row]) + slot.scaling * x_BTD[row] @ slot.a_RD.T @ slot.b_OR.T
        torch.testing.assert_close(y_BTO[row], alone, rtol=1e-5, atol=1e-5)
    assert y_BTO[2].equal(linear(x_BTD)[2])


@pytest.mark.parametrize("expert", [2, NULL_EXPERT])
def test_an_expert_without_this_linear_leaves_it_alone(linear, x_BTD, expert):
    one = torch.tensor([[expert]])
    for route in (PromptRoute(one, torch.ones(1, 1)), LayerRoute(one, torch.zeros(1, 1))):
        module = routed(linear, make_slots(), route)
        assert module(x_BTD).equal(linear(x_BTD))


@pytest.mark.parametrize("route", [BaseOnly(), TokenRoute(), PromptRoute(torch.tensor([[2]]), torch.ones(1, 1))])
def test_without_any_expert_the_base_answers(linear, x_BTD, route):
    assert routed(linear, [], route)(x_BTD).equal(linear(x_BTD))
    assert routed(linear, make_slots(), BaseOnly())(x_BTD).equal(linear(x_BTD))


def test_one_expert_choosing_for_itself_is_its_lora(linear, x_BTD, form):
    (slot,) = make_slots({0: 3})
    lora = linear(x_BTD) + slot.scaling * x_BTD @ slot.a_RD.T @ slot.b_OR.T
    torch.testing.assert_close(routed(linear, [slot], TokenRoute())(x_BTD), lora, rtol=1e-5, atol=1e-5)


def test_experts_stand_where_the_linear_is(linear):
    experts = LinearExperts.stacked(linear, make_slots(), POOL, CLASSIFIER)
    assert experts.beside(linear) is experts
    moved = experts.beside(linear.to("meta", torch.bfloat16))
    assert {moved.down_SD.dtype, moved.up_SO.dtype} == {torch.bfloat16}
    tensors = [t for t in [*vars(moved).values(), *vars(moved.classifier).values()] if isinstance(t, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.is_meta for tensor in tensors)


def test_the_base_linear_is_the_same_object_and_nothing_trains(linear):
    module = routed(linear, make_slots(), BaseOnly())
    assert module.base is linear
    assert list(module.state_dict()) == ["base.weight", "base.bias"]
    assert not any(p.requires_grad for p in module.parameters())


ROUTES = [
    TokenRoute(2),
    PromptRoute(LIST_BM, torch.full((B, 3), 0.25)),
    PromptRoute(LIST_BM[:1], torch.ones(1, 3)),
    LayerRoute(LIST_BM, torch.zeros(B, 3)),
]


@pytest.mark.parametrize("route", ROUTES)
def test_half_precision_stays_half_precision(linear, x_BTD, route, form):
    slots = make_slots()
    exact = routed(linear.float(), slots, route)(x_BTD)
    half = routed(linear.bfloat16(), slots, route)(x_BTD.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("route", ROUTES)
def test_compiled_code_computes_the_same(linear, x_BTD, route):
    module = routed(linear, make_slots(), route)
    expected = module(x_BTD)
    state_of(module).cached_choice.clear()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for _ in ("chosen", "held"):
        torch.testing.assert_close(compiled(x_BTD), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(route, TokenRoute) or "path" in state_of(module).cached_choice


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_pass_through_to_the_input_with_and_without_checkpointing(linear, x_BTD, route, form):
    module, grads = routed(linear, make_slots(), route), []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        x = x_BTD.clone().requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_votes_are_mean_weights_over_the_prompts_real_tokens(linear, x_BTD, form):
    slots = make_slots()
    tokens_BT = torch.ones(B, T)
    tokens_BT[1, :3] = 0
    module = routed(linear, slots, TokenRoute(2), None, tokens_BT)
    module(x_BTD)
    weight = token_weight(slots, x_BTD, 2, 1.0)
    expected_BE = torch.zeros(B, POOL)
    for b in range(B):
        real = [t for t in range(T) if tokens_BT[b, t]]
        for i, slot in enumerate(slots):
            expected_BE[b, slot.expert] = sum(weight(b, t, i) for t in real) / len(real)
    torch.testing.assert_close(state_of(module).weights_BE, expected_BE, rtol=1e-5, atol=1e-6)
    module(x_BTD)  # as when a checkpointed layer runs again
    torch.testing.assert_close(state_of(module).weights_BE, expected_BE, rtol=1e-5, atol=1e-6)
    state_of(module).decode()
    module(x_BTD[:, -1:])
    torch.testing.assert_close(state_of(module).weights_BE, expected_BE, rtol=1e-5, atol=1e-6)


def test_traces_hold_the_weight_of_every_expert_at_every_token(linear, x_BTD, form):
    module = routed(linear, make_slots(), TokenRoute(2))
    module(x_BTD)
    assert state_of(module).traces is None
    state_of(module).traces = {}
    module(x_BTD)
    weights_BTE = state_of(module).traces["path"]
    assert weights_BTE.shape == (B, T, POOL)
    y_BTO = naive(linear, make_slots(), x_BTD, lambda b, t, i: weights_BTE[b, t, list(RANKS)[i]])
    torch.testing.assert_close(module(x_BTD), y_BTO, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("route", ROUTES)
def test_linears_on_several_devices(x_BTD, route, monkeypatch):
    """Devices without memory: operators compute shapes, and refuse tensors of two devices."""
    if isinstance(route, LayerRoute):  # it looks at values to leave out who has no weight, except in compiled code
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    slots = [dataclasses.replace(slot, b_OR=torch.zeros(D, len(slot.a_RD))) for slot in make_slots()]
    stacked = LinearExperts.stacked(nn.Linear(D, D), slots, POOL, CLASSIFIER)
    devices = [torch.device("cpu", i) for i in (0, 1)]
    current, linears, experts = Current([]), [], {}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        for i, device in enumerate(devices):
            linear = nn.Linear(D, D, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.empty(D, D, device=device), requires_grad=False)
            classifier = dataclasses.replace(CLASSIFIER, follows="0" if i else None)
            experts[str(i)] = dataclasses.replace(stacked, classifier=classifier).beside(linear)
            linears.append(RoutedLinear(linear, current, str(i)))
        tensors = {name: value.to(devices[0]) for name, value in vars(route).items() if isinstance(value, torch.Tensor)}
        state = RoutingState(POOL, dataclasses.replace(route, **tensors), torch.ones(B, T).to(devices[0]))
        current.running = Running(state, PoolExperts(experts), current)
        for tokens in (T, 1):
            h_BTD = torch.empty(B, tokens, D, device=devices[0])
            for device, linear in zip(devices, linears, strict=True):
                h_BTD = linear(h_BTD.to(device))
            assert h_BTD.device == devices[1]
            state.decode()
        for path, held in state.cached_choice.items():
            assert {tensor.device for tensor in held} == {experts[path].down_SD.device}
        assert state.weights_BE is None or state.weights_BE.device == devices[0]
