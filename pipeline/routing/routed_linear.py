"""The routed Linear: a frozen Linear with any number of LoRA experts beside it.

    y = W x + sum_e w_e s_e B_e A_e x        as        ((w (x) 1_r) o (x A_cat^T)) B_cat^T

    x (B, T, D) --+-- W --------------------------------(+)-- y (B, T, O)
                  |                                      |
                  +-- A --- (B, T, R) -- o w[slot] -- s B

All down-projections are one product, the masked up-projection another; nothing of shape (tokens, experts, O). Which rows
of A and B take part depends on the route:

- a list of experts (`PromptRoute`, `LayerRoute`): their rows are gathered, each prompt's own; the cost does not depend on
  the size of the pool;
- whole pool (`TokenRoute`), small: all rows at once, the scores of the routing vectors in the same product;
- whole pool, large: scores of all experts, then each chosen expert once, on the tokens that chose it.

Experts of different ranks stand side by side; an expert without this Linear changes nothing in it. Shapes: B rows, T
tokens, D and O widths of the Linear, E experts here, M places on a list, R rank, K chosen, S rows, X classes.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.layer_classifiers import LayerClassifier, add_log_likelihood
from pipeline.routing.routes import MIN_WEIGHT, LayerRoute, PromptRoute, RoutingState, TokenRoute, to_pool_weights
from pipeline.routing.token_router import keep_largest, normalise_vector, token_scores

DENSE_EXPERTS = 16
"""Up to this many experts a Linear takes all of them at once: cheaper than sorting tokens (`pointsman benchmark routing`)."""


@dataclass(frozen=True)
class Slot:
    """One expert's part in one Linear."""

    expert: int
    """The expert's index in the pool."""
    a_RD: Tensor
    b_OR: Tensor
    scaling: float
    vector_D: Tensor


@dataclass(frozen=True)
class LinearExperts:
    """The experts of one pool in one Linear, stacked, in its type and on its device."""

    down_SD: Tensor
    """All A, a row of zeros, then all normalised routing vectors."""
    up_SO: Tensor
    """All scaled B, transposed, and a row of zeros."""
    rows_ER: Tensor
    """Rows of `down_SD` that belong to an expert of the pool (E + 1, R), filled up with the row of zeros. The last line,
    NULL_EXPERT's, is all zeros, as is that of an expert without this Linear."""
    pool_E: Tensor
    """Index in the pool of the experts here."""
    owner_S: Tensor
    """Which of the experts here a row of A belongs to."""
    starts: tuple[int, ...]
    """First row of A of each expert here, and the number of them all."""
    classifier: LayerClassifier = LayerClassifier(None)

    @classmethod
    def stacked(
        cls,
        linear: nn.Linear,
        slots: Sequence[Slot],
        pool_size: int,
        classifier: LayerClassifier | None = None,
        *,
        height: int = 0,
    ) -> "LinearExperts":
        """Stacks what the experts of a pool of `pool_size` do in `linear`.

        `height` is the largest rank here of the whole pool, where that is not among these: lists of the same size round alike.
        """
        ranks = [len(slot.a_RD) for slot in slots]
        starts = tuple(sum(ranks[:i]) for i in range(len(ranks) + 1))
        vectors = [normalise_vector(slot.vector_D.float())[None] for slot in slots]
        nothing_D, nothing_O = (torch.zeros(1, size) for size in (linear.in_features, linear.out_features))
        rows = torch.full((pool_size + 1, max([*ranks, height])), starts[-1])
        for i, (slot, rank) in enumerate(zip(slots, ranks, strict=True)):
            rows[slot.expert, :rank] = torch.arange(starts[i], starts[i + 1])
        return cls(
            down_SD=torch.cat([*(slot.a_RD.float() for slot in slots), nothing_D, *vectors]),
            up_SO=torch.cat([*(slot.scaling * slot.b_OR.float().T for slot in slots), nothing_O]),
            rows_ER=rows,
            pool_E=torch.tensor([slot.expert for slot in slots], dtype=torch.long),
            owner_S=torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(ranks, dtype=torch.long)),
            starts=starts,
            classifier=classifier or LayerClassifier(None),
        ).beside(linear)

    @classmethod
    def room(
        cls, linear: nn.Linear, rows: int, height: int, pool_size: int, classifier: LayerClassifier | None = None
    ) -> "LinearExperts":
        """Returns `rows` empty rows for experts of ranks up to `height` in `linear`, of a pool of `pool_size`."""
        like: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        device = linear.weight.device
        return cls(
            down_SD=torch.zeros(rows + 1, linear.in_features, **like),
            up_SO=torch.zeros(rows + 1, linear.out_features, **like),
            rows_ER=torch.full((pool_size + 1, height), rows, device=device),
            pool_E=torch.zeros(0, dtype=torch.long, device=device),
            owner_S=torch.zeros(0, dtype=torch.long, device=device),
            starts=(0,),
            classifier=(classifier or LayerClassifier(None)).to(device),
        )

    def beside(self, linear: nn.Linear) -> "LinearExperts":
        """Returns the same in the type and on the device of this Linear's weight."""
        like: Any = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        if (self.down_SD.dtype, self.down_SD.device) == (like["dtype"], like["device"]):
            return self
        device = like["device"]
        return replace(
            self,
            down_SD=self.down_SD.to(**like),
            up_SO=self.up_SO.to(**like),
            rows_ER=self.rows_ER.to(device),
            pool_E=self.pool_E.to(device),
            owner_S=self.owner_S.to(device),
            classifier=self.classifier.to(device),
        )


@dataclass(eq=False)
class PoolExperts:
    """The experts of one pool in all Linears that they adapt, by path, in the model's order.

    Immutable but for `by_path`'s places: a call ends with the object that it began with, whatever is loaded meanwhile.
    """

    by_path: dict[str, LinearExperts]
    part_of: "PoolExperts | None" = None
    """Those that all calls share, where these are one call's."""


@dataclass(frozen=True, eq=False)
class Running:
    """A call on its way: its state, and the experts that it began with."""

    state: RoutingState
    experts: PoolExperts
    owner: "Current"
    """Where it runs."""

    def __deepcopy__(self, memo: Mapping[int, Any]) -> "Running":
        """A copy of a KV cache goes on with the same choices."""
        return self


class Current(threading.local):
    """Which call the routed Linears of a model work for: each thread has its own.

    A thread without one takes the call that recorded gradients last: autograd computes the activations of checkpointed
    layers again in threads of its own. So one model serves any number of threads, and trains in one.
    """

    running: Running | None

    def __init__(self, recorded: list[Running]) -> None:
        self.running = None
        self.recorded = recorded


class RoutedLinear(nn.Module):
    """A frozen Linear, and beside it the experts of the call that runs."""

    def __init__(self, base: nn.Linear, current: Current, path: str) -> None:
        super().__init__()
        self.base, self.current, self.path = base, current, path

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        y_BTO = self.base(x_BTD)
        running = self.current.running
        if running is None:
            if not self.current.recorded:
                return y_BTO
            running = self.current.recorded[0]
        experts, state = running.experts.by_path.get(self.path), running.state
        if experts is None:
            return y_BTO
        match state.route:
            case PromptRoute() | LayerRoute():
                held = state.cached_choice.get(self.path)
                return self._gathered(x_BTD, y_BTO, experts, *(held or self._choose(x_BTD, experts, state)))
            case TokenRoute() as route if len(experts.pool_E):
                return self._by_token(x_BTD, y_BTO, experts, state, route)
        return y_BTO

    def _gathered(
        self, x_BTD: Tensor, y_BTO: Tensor, experts: LinearExperts, rows_BS: Tensor, weights_BS: Tensor
    ) -> Tensor:
        """Adds the chosen experts; their rows are gathered, so that every prompt pays for its own experts only.

        Where all prompts agree, one list stands for the batch, and its matrices are shared instead of copied per prompt.
        """
        if len(rows_BS) == 1:
            (rows_S,) = rows_BS
            h_NS = (x_BTD.flatten(0, 1) @ experts.down_SD[rows_S].T) * weights_BS
            return torch.addmm(y_BTO.flatten(0, 1), h_NS, experts.up_SO[rows_S]).view_as(y_BTO)
        h_BTS = torch.bmm(x_BTD, experts.down_SD[rows_BS].transpose(1, 2)) * weights_BS.unsqueeze(1)
        return torch.baddbmm(y_BTO, h_BTS, experts.up_SO[rows_BS])

    @torch.no_grad()
    def _choose(self, x_BTD: Tensor, experts: LinearExperts, state: RoutingState) -> tuple[Tensor, Tensor]:
        """Chooses the rows that take part and their weights (B, S), which the call holds from then on."""
        if isinstance(state.route, LayerRoute):
            experts_BM, weights_BM = self._layer_weights(x_BTD, experts.classifier, state, state.route)
        else:
            assert isinstance(state.route, PromptRoute)
            experts_BM = state.on(x_BTD.device, state.route.experts_BM)
            weights_BM = state.on(x_BTD.device, state.route.weights_BM)
        rows_BS = experts.rows_ER[experts_BM].flatten(1)
        weights_BS = weights_BM.repeat_interleave(experts.rows_ER.shape[-1], dim=-1).to(x_BTD.dtype)
        state.cached_choice[self.path] = rows_BS, weights_BS
        return rows_BS, weights_BS

    def _layer_weights(
        self, x_BTD: Tensor, classifier: LayerClassifier, state: RoutingState, route: LayerRoute
    ) -> tuple[Tensor, Tensor]:
        """Weights the candidates by the log-likelihood of the prompt: experts and weights (B, M).

        The log-likelihood is the sum over all layers up to this one, so later layers are surer than earlier ones. The prior is
        the prompt router's posterior. Weights below MIN_WEIGHT are cut off: a clear prompt then costs one expert, not M.
        """
        assert state.tokens_BT is not None
        device = x_BTD.device
        before_BX = None if classifier.follows is None else state.log_likelihoods[classifier.follows].to(device)
        # Set, not added up: gradient checkpointing runs a forward pass twice.
        log_likelihood_BX = add_log_likelihood(
            classifier, before_BX, x_BTD, state.on(device, state.tokens_BT), state.pool_size + 1
        )
        state.log_likelihoods[self.path] = log_likelihood_BX
        experts_BM = state.on(device, route.experts_BM).expand(len(x_BTD), -1)
        chosen_BM = log_likelihood_BX.gather(-1, experts_BM % (state.pool_size + 1))
        best_BM, place_BM = (chosen_BM / route.temperature + state.on(device, route.prior_BM)).topk(
            min(route.top_k, experts_BM.shape[-1]), dim=-1
        )
        experts_BM, weights_BM = experts_BM.gather(-1, place_BM), best_BM.softmax(-1)
        weights_BM = weights_BM.where(weights_BM >= MIN_WEIGHT, 0)
        weights_BM = weights_BM / weights_BM.sum(-1, keepdim=True)
        if not torch.compiler.is_compiling():
            state.layer_weights[self.path] = to_pool_weights(weights_BM, experts_BM, state.pool_size)
            count = int((weights_BM > 0).sum(-1).max())  # in falling order: who has no weight is cut off
            experts_BM, weights_BM = experts_BM[:, :count], weights_BM[:, :count]
            if count == 1 and len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all():
                experts_BM, weights_BM = experts_BM[:1], weights_BM[:1]
        return experts_BM, weights_BM

    def _by_token(
        self, x_BTD: Tensor, y_BTO: Tensor, experts: LinearExperts, state: RoutingState, route: TokenRoute
    ) -> Tensor:
        """Adds the experts that the tokens choose from all."""
        count = len(experts.pool_E)
        if count <= DENSE_EXPERTS or torch.compiler.is_compiling():
            h_BTS = x_BTD @ experts.down_SD.T
            scores_BTE = token_scores(h_BTS[..., -count:], x_BTD) / route.temperature
            weights_BTE = keep_largest(scores_BTE, route.top_k)
            self._note(weights_BTE, experts, state)
            h_BTR = h_BTS[..., : experts.starts[-1]] * weights_BTE[..., experts.owner_S].to(h_BTS.dtype)
            return torch.addmm(y_BTO.flatten(0, 1), h_BTR.flatten(0, 1), experts.up_SO[:-1]).view_as(y_BTO)
        scores_BTE = token_scores(x_BTD @ experts.down_SD[-count:].T, x_BTD) / route.temperature
        best_BTK, chosen_BTK = scores_BTE.topk(min(route.top_k, count), dim=-1)
        weights_BTK = best_BTK.softmax(-1)
        self._note(torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, weights_BTK), experts, state)
        return self._scatter(x_BTD, y_BTO, experts, weights_BTK, chosen_BTK)

    def _scatter(
        self, x_BTD: Tensor, y_BTO: Tensor, experts: LinearExperts, weights_BTK: Tensor, chosen_BTK: Tensor
    ) -> Tensor:
        """Adds each chosen expert once, on the tokens that chose it: views of the weights, no copies.

        Choices are sorted by expert, so that the tokens of one expert lie side by side and one product serves them all. Its
        cost grows with tokens x top_k, not with the size of the pool.
        """
        x_ND, y_NO = x_BTD.flatten(0, 1), y_BTO.flatten(0, 1)
        flat_C, weights_C = chosen_BTK.flatten(), weights_BTK.flatten().to(x_BTD.dtype)
        order_C = flat_C.argsort()
        token_C = order_C // chosen_BTK.shape[-1]
        first = 0
        for expert, count in enumerate(flat_C.bincount(minlength=len(experts.pool_E)).tolist()):
            if count == 0:
                continue
            mine, tokens = order_C[first : first + count], token_C[first : first + count]
            rows = slice(experts.starts[expert], experts.starts[expert + 1])
            h_CR = x_ND[tokens] @ experts.down_SD[rows].T
            y_NO.index_add_(0, tokens, (h_CR * weights_C[mine].unsqueeze(-1)) @ experts.up_SO[rows])
            first += count
        return y_NO.view_as(y_BTO)

    def _note(self, weights_BTE: Tensor, experts: LinearExperts, state: RoutingState) -> None:
        """Notes the weights of the experts here while the prompt is read; never in compiled code."""
        if torch.compiler.is_compiling() or state.decoding:
            return
        weights_BTP = weights_BTE.new_zeros(*weights_BTE.shape[:-1], state.pool_size)
        weights_BTP = weights_BTP.index_copy(-1, experts.pool_E, weights_BTE)
        if state.tokens_BT is not None and state.tokens_BT.shape == weights_BTE.shape[:2]:
            tokens_BT1 = state.on(weights_BTE.device, state.tokens_BT).unsqueeze(-1).float()
            state.layer_weights[self.path] = (weights_BTP * tokens_BT1).sum(1) / tokens_BT1.sum(1).clamp(min=1)
        if state.traces is not None:
            state.traces[self.path] = weights_BTP.detach()
