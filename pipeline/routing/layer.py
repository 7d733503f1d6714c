"""The routed Linear: a frozen Linear with any number of LoRA experts beside it.

    y = W x + sum_e w_e s_e B_e A_e x        as        ((w (x) 1_r) o (x A_cat^T)) B_cat^T

    x (B, T, D) --+-- W --------------------------------(+)-- y (B, T, O)
                  |                                      |
                  +-- A --- (B, T, R) -- o w[slot] -- s B

All down-projections are one product, the masked up-projection another; nothing of shape (tokens, experts, O). Which rows
of A and B take part depends on the route:

- a list of experts (`Fixed`, `Weighed`): their rows are gathered, each prompt's own; the cost does not depend on the size
  of the pool;
- whole pool (`Free`), small: all rows at once, the scores of the routing vectors in the same product;
- whole pool, large: scores of all experts, then each chosen expert once, on the tokens that chose it.

Experts of different ranks stand side by side; an expert without this Linear changes nothing in it. Shapes: B rows, T
tokens, D and O widths of the Linear, E experts here, M places on a list, R rank, K chosen, S rows, X classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.evidence import Hearing, add_evidence
from pipeline.routing.route import SLIGHT, Fixed, Free, RoutingState, Weighed, spread
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


class RoutedLinear(nn.Module):
    """A frozen Linear and the experts that adapt it."""

    down_SD: Tensor
    """All A, a row of zeros, then all normalised routing vectors."""
    up_SO: Tensor
    """All scaled B, transposed, and a row of zeros."""
    rows_ER: Tensor
    """Rows of `down_SD` that belong to an expert of the pool (E + 1, R), filled up with the row of zeros. The last line,
    NOBODY's, is all zeros, as is that of an expert without this Linear."""
    pool_E: Tensor
    """Index in the pool of the experts here."""
    owner_S: Tensor
    """Which of the experts here a row of A belongs to."""

    def __init__(self, base: nn.Linear, state: RoutingState, path: str, slots: Sequence[Slot] = ()) -> None:
        super().__init__()
        self.base, self.state, self.path = base, state, path
        self.hearing = Hearing(None)
        self.held = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0)
        self.load(slots)

    def load(self, slots: Sequence[Slot]) -> None:
        """Takes these experts instead of those before."""
        kind: Any = {"dtype": self.base.weight.dtype, "device": self.base.weight.device}
        ranks = [len(slot.a_RD) for slot in slots]
        self.starts = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
        zero = self.starts[-1]
        vectors = [normalise_vector(slot.vector_D.float())[None] for slot in slots]
        nothing_D, nothing_O = (torch.zeros(1, size) for size in (self.base.in_features, self.base.out_features))
        down = torch.cat([*(slot.a_RD.float() for slot in slots), nothing_D, *vectors])
        up = torch.cat([*(slot.scaling * slot.b_OR.float().T for slot in slots), nothing_O])
        rows = torch.full((self.state.pool_size + 1, max(ranks, default=0)), zero)
        for i, (slot, rank) in enumerate(zip(slots, ranks, strict=True)):
            rows[slot.expert, :rank] = torch.arange(self.starts[i], self.starts[i + 1])
        owners = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(ranks, dtype=torch.long))
        tensors = {
            "down_SD": down.to(**kind),
            "up_SO": up.to(**kind),
            "rows_ER": rows.to(kind["device"]),
            "pool_E": torch.tensor([slot.expert for slot in slots], dtype=torch.long, device=kind["device"]),
            "owner_S": owners.to(kind["device"]),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        y_BTO = self.base(x_BTD)
        match self.state.route:
            case Fixed() as route:
                return self._listed(x_BTD, y_BTO, route.experts_BM, route.weights_BM)
            case Weighed() as route:
                return self._listed(x_BTD, y_BTO, *self._weigh(x_BTD, route))
            case Free() as route if len(self.pool_E):
                return self._free(x_BTD, y_BTO, route)
        return y_BTO

    def _listed(self, x_BTD: Tensor, y_BTO: Tensor, experts_BM: Tensor, weights_BM: Tensor) -> Tensor:
        """Adds the listed experts; their rows are gathered, so that every prompt pays for its own list only."""
        rows_BS = self.rows_ER[experts_BM].flatten(1)
        weights_BS = weights_BM.repeat_interleave(self.rows_ER.shape[-1], dim=-1).to(x_BTD.dtype)
        if len(rows_BS) == 1:
            (rows_S,) = rows_BS
            h_NS = (x_BTD.flatten(0, 1) @ self.down_SD[rows_S].T) * weights_BS
            return torch.addmm(y_BTO.flatten(0, 1), h_NS, self.up_SO[rows_S]).view_as(y_BTO)
        h_BTS = torch.bmm(x_BTD, self.down_SD[rows_BS].transpose(1, 2)) * weights_BS.unsqueeze(1)
        return torch.baddbmm(y_BTO, h_BTS, self.up_SO[rows_BS])

    @torch.no_grad()
    def _weigh(self, x_BTD: Tensor, route: Weighed) -> tuple[Tensor, Tensor]:
        """Weighs the listed experts by the evidence at prefill, and keeps to that: experts and weights (B, M)."""
        state, follows = self.state, self.hearing.follows
        if state.tokens_BT is None:
            return self.held
        before_BX = None if follows is None else state.evidence[follows]
        # Set, not added up: gradient checkpointing runs a forward pass twice.
        evidence_BX = add_evidence(self.hearing, before_BX, x_BTD, state.tokens_BT, state.pool_size + 1)
        state.evidence[self.path] = evidence_BX
        experts_BM = route.experts_BM.expand(len(x_BTD), -1)
        listed_BM = evidence_BX.gather(-1, experts_BM % (state.pool_size + 1))
        best_BM, place_BM = (listed_BM / route.temperature + route.prior_BM).topk(
            min(route.top_k, experts_BM.shape[-1]), dim=-1
        )
        experts_BM, weights_BM = experts_BM.gather(-1, place_BM), best_BM.softmax(-1)
        weights_BM = weights_BM.where(weights_BM >= SLIGHT, 0)
        weights_BM = weights_BM / weights_BM.sum(-1, keepdim=True)
        if not torch.compiler.is_compiling():
            state.votes[self.path] = spread(weights_BM, experts_BM, state.pool_size)
            places = int((weights_BM > 0).sum(-1).max())  # in falling order: who has no weight is cut off
            experts_BM, weights_BM = experts_BM[:, :places], weights_BM[:, :places]
            if places == 1 and len(experts_BM) > 1 and (experts_BM == experts_BM[0]).all():
                experts_BM, weights_BM = experts_BM[:1], weights_BM[:1]
        self.held = experts_BM, weights_BM
        return self.held

    def _free(self, x_BTD: Tensor, y_BTO: Tensor, route: Free) -> Tensor:
        """Adds the experts that the tokens choose from all."""
        experts = len(self.pool_E)
        if experts <= DENSE_EXPERTS or torch.compiler.is_compiling():
            h_BTS = x_BTD @ self.down_SD.T
            scores_BTE = token_scores(h_BTS[..., -experts:], x_BTD) / route.temperature
            weights_BTE = keep_largest(scores_BTE, route.top_k)
            self._note(weights_BTE)
            h_BTR = h_BTS[..., : self.starts[-1]] * weights_BTE[..., self.owner_S].to(h_BTS.dtype)
            return torch.addmm(y_BTO.flatten(0, 1), h_BTR.flatten(0, 1), self.up_SO[:-1]).view_as(y_BTO)
        scores_BTE = token_scores(x_BTD @ self.down_SD[-experts:].T, x_BTD) / route.temperature
        best_BTK, chosen_BTK = scores_BTE.topk(min(route.top_k, experts), dim=-1)
        weights_BTK = best_BTK.softmax(-1)
        self._note(torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, weights_BTK))
        return self._scatter(x_BTD, y_BTO, weights_BTK, chosen_BTK)

    def _scatter(self, x_BTD: Tensor, y_BTO: Tensor, weights_BTK: Tensor, chosen_BTK: Tensor) -> Tensor:
        """Adds each chosen expert once, on the tokens that chose it: views of the weights, no copies."""
        x_ND, y_NO = x_BTD.flatten(0, 1), y_BTO.flatten(0, 1)
        flat_C, weights_C = chosen_BTK.flatten(), weights_BTK.flatten().to(x_BTD.dtype)
        order_C = flat_C.argsort()
        token_C = order_C // chosen_BTK.shape[-1]
        first = 0
        for expert, count in enumerate(flat_C.bincount(minlength=len(self.pool_E)).tolist()):
            if count == 0:
                continue
            mine, tokens = order_C[first : first + count], token_C[first : first + count]
            rows = slice(self.starts[expert], self.starts[expert + 1])
            h_CR = x_ND[tokens] @ self.down_SD[rows].T
            y_NO.index_add_(0, tokens, (h_CR * weights_C[mine].unsqueeze(-1)) @ self.up_SO[rows])
            first += count
        return y_NO.view_as(y_BTO)

    def _note(self, weights_BTE: Tensor) -> None:
        """Notes the weights of the experts here, at prefill and while traces are kept; never in compiled code."""
        state = self.state
        if torch.compiler.is_compiling() or (state.tokens_BT is None and state.traces is None):
            return
        whole_BTE = weights_BTE.new_zeros(*weights_BTE.shape[:-1], state.pool_size)
        whole_BTE = whole_BTE.index_copy(-1, self.pool_E, weights_BTE)
        tokens_BT = state.tokens_BT
        if tokens_BT is not None and tokens_BT.shape == weights_BTE.shape[:2]:
            tokens_BT1 = tokens_BT.unsqueeze(-1).float()
            state.votes[self.path] = (whole_BTE * tokens_BT1).sum(1) / tokens_BT1.sum(1).clamp(min=1)
        if state.traces is not None:
            state.traces[self.path] = whole_BTE.detach()


class GatedLinear(nn.Module):
    """The router stage's Linear: base and expert frozen, one trainable routing vector.

    y_t = W x_t + sigmoid(<x_t, v>) s B A x_t, v zero at the start (PHATGOOSE, arXiv 2402.05859, section 3.1).
    """

    a_RD: Tensor
    b_OR: Tensor

    def __init__(self, base: nn.Linear, a_RD: Tensor, b_OR: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        kind: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.register_buffer("a_RD", a_RD.to(**kind), persistent=False)
        self.register_buffer("b_OR", (scaling * b_OR.float()).to(**kind), persistent=False)
        self.vector = nn.Parameter(torch.zeros(a_RD.shape[1], **kind))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        # One product for both: its backward pass makes one gradient as large as x, not two.
        low_BTR, score_BT1 = (x_BTD @ torch.cat([self.a_RD, self.vector[None]]).T).tensor_split([-1], dim=-1)
        return self.base(x_BTD) + (torch.sigmoid(score_BT1) * low_BTR) @ self.b_OR.T
