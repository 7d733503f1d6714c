"""The routed Linear: a frozen Linear with any number of LoRA experts beside it.

    y = W x + sum_e w_e s_e B_e A_e x        as        ((w (x) 1_r) o (x A_cat^T)) B_cat^T

    x (B, T, D) --+-- W ----------------------------------------------(+)-- y (B, T, O)
                  |                                                    |
                  +-- [A; u] --+-- (B, T, R) -- o w[slot] -- s B ------+
                               +-- (B, T, E) -- token scores -> w

Down-projections and scores are one product, the masked up-projection another; nothing of shape (tokens, experts, O).
Which rows of A, u and B take part depends on the route:

- short list (`Fixed`, `Mixed`): the rows of the listed experts are gathered, each prompt's own; the cost does not depend
  on the size of the pool;
- whole pool (`Free`), small: all rows at once;
- whole pool, large: scores of all experts, then each chosen expert once, on the tokens that chose it.

Experts of different ranks stand side by side; an expert without this Linear scores 0 on a short list and changes nothing.
Shapes: B rows, T tokens, D and O widths of the Linear, E experts here, M places on a short list, R rank, K chosen, S rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.route import Fixed, Free, Mixed, RoutingState, spread
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
    rows_EX: Tensor
    """Rows of `down_SD` that belong to an expert of the pool, (E + 1, R + 1): its A, filled up with the row of zeros,
    then its vector. The last line, NOBODY's, is all zeros, as is that of an expert without this Linear."""
    pool_E: Tensor
    """Index in the pool of the experts here, and `owner_S`: which of them a row of A belongs to."""
    owner_S: Tensor

    def __init__(self, base: nn.Linear, state: RoutingState, path: str, slots: Sequence[Slot] = ()) -> None:
        super().__init__()
        self.base, self.state, self.path = base, state, path
        self.load(slots)

    def load(self, slots: Sequence[Slot]) -> None:
        """Takes these experts instead of those before."""
        kind: Any = {"dtype": self.base.weight.dtype, "device": self.base.weight.device}
        ranks = [len(slot.a_RD) for slot in slots]
        self.starts = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
        zero = self.starts[-1]
        width = max(ranks, default=0)
        vectors = [normalise_vector(slot.vector_D.float())[None] for slot in slots]
        nothing_D, nothing_O = (torch.zeros(1, size) for size in (self.base.in_features, self.base.out_features))
        down = torch.cat([*(slot.a_RD.float() for slot in slots), nothing_D, *vectors])
        up = torch.cat([*(slot.scaling * slot.b_OR.float().T for slot in slots), nothing_O])
        rows = torch.full((self.state.pool_size + 1, width + 1), zero)
        for i, (slot, rank) in enumerate(zip(slots, ranks, strict=True)):
            rows[slot.expert, :rank] = torch.arange(self.starts[i], self.starts[i + 1])
            rows[slot.expert, -1] = zero + 1 + i
        owners = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(ranks, dtype=torch.long))
        tensors = {
            "down_SD": down.to(**kind),
            "up_SO": up.to(**kind),
            "rows_EX": rows.to(kind["device"]),
            "pool_E": torch.tensor([slot.expert for slot in slots], dtype=torch.long, device=kind["device"]),
            "owner_S": owners.to(kind["device"]),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        y_BTO = self.base(x_BTD)
        match self.state.route:
            case Fixed() | Mixed() as route:
                return self._listed(x_BTD, y_BTO, route)
            case Free() as route if len(self.pool_E):
                return self._free(x_BTD, y_BTO, route)
        return y_BTO

    def _listed(self, x_BTD: Tensor, y_BTO: Tensor, route: Fixed | Mixed) -> Tensor:
        """Adds the listed experts; their rows are gathered, so that every prompt pays for its own list only."""
        index_BMX = self.rows_EX[route.experts_BM]
        lists, places, _ = index_BMX.shape
        index_BMR = index_BMX[..., :-1]
        if isinstance(route, Fixed):
            a_BSD = self.down_SD[index_BMR.flatten(1)]
            h_BTMR = _times(x_BTD, a_BSD).unflatten(-1, (places, -1))
            weights_BTM = route.weights_BM.unsqueeze(1)
        else:
            a_BSD = self.down_SD[index_BMX.flatten(1)]
            h_BTMR, products_BTM1 = _times(x_BTD, a_BSD).unflatten(-1, (places, -1)).tensor_split([-1], dim=-1)
            scores_BTM = token_scores(products_BTM1.squeeze(-1), x_BTD) / route.temperature
            weights_BTM = (scores_BTM + route.prior_BM.unsqueeze(1)).softmax(-1)
            self._note(spread(weights_BTM, route.experts_BM, self.state.pool_size))
        b_BSO = self.up_SO[index_BMR.flatten(1)]
        h_BTS = (h_BTMR * weights_BTM.unsqueeze(-1).to(h_BTMR.dtype)).flatten(2)
        if lists == 1:
            return torch.addmm(y_BTO.flatten(0, 1), h_BTS.flatten(0, 1), b_BSO[0]).view_as(y_BTO)
        return torch.baddbmm(y_BTO, h_BTS, b_BSO)

    def _free(self, x_BTD: Tensor, y_BTO: Tensor, route: Free) -> Tensor:
        """Adds the experts that the tokens choose from all."""
        experts = len(self.pool_E)
        if experts <= DENSE_EXPERTS or torch.compiler.is_compiling():
            h_BTS = x_BTD @ self.down_SD.T
            scores_BTE = token_scores(h_BTS[..., -experts:], x_BTD) / route.temperature
            weights_BTE = keep_largest(scores_BTE, route.top_k)
            self._note(self._in_pool(weights_BTE))
            h_BTR = h_BTS[..., : self.starts[-1]] * weights_BTE[..., self.owner_S].to(h_BTS.dtype)
            return torch.addmm(y_BTO.flatten(0, 1), h_BTR.flatten(0, 1), self.up_SO[:-1]).view_as(y_BTO)
        scores_BTE = token_scores(x_BTD @ self.down_SD[-experts:].T, x_BTD) / route.temperature
        best_BTK, chosen_BTK = scores_BTE.topk(min(route.top_k, experts), dim=-1)
        weights_BTK = best_BTK.softmax(-1)
        if self._noting:
            weights_BTE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, weights_BTK)
            self._note(self._in_pool(weights_BTE))
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

    def _in_pool(self, weights_BTE: Tensor) -> Tensor:
        """Turns weights of the experts here into weights of the pool's."""
        whole = weights_BTE.new_zeros(*weights_BTE.shape[:-1], self.state.pool_size)
        return whole.index_copy(-1, self.pool_E, weights_BTE)

    @property
    def _noting(self) -> bool:
        """Whether anybody wants to know: at prefill, and while traces are kept; never in compiled code."""
        state = self.state
        return not torch.compiler.is_compiling() and (state.tokens_BT is not None or state.traces is not None)

    def _note(self, weights_BTE: Tensor) -> None:
        """Notes the weights of the pool's experts (B, T, E). Set, not added: checkpointing runs a forward pass twice."""
        if not self._noting:
            return
        tokens_BT = self.state.tokens_BT
        if tokens_BT is not None and tokens_BT.shape == weights_BTE.shape[:2]:
            tokens_BT1 = tokens_BT.unsqueeze(-1).float()
            self.state.votes[self.path] = (weights_BTE * tokens_BT1).sum(1) / tokens_BT1.sum(1).clamp(min=1)
        if self.state.traces is not None:
            self.state.traces[self.path] = weights_BTE.detach()


def _times(x_BTD: Tensor, a_BSD: Tensor) -> Tensor:
    """Returns x A^T (B, T, S) for one A a row, or one for all rows."""
    return x_BTD @ a_BSD[0].T if len(a_BSD) == 1 else torch.bmm(x_BTD, a_BSD.transpose(1, 2))


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
        gate_BT1 = torch.sigmoid(x_BTD @ self.vector).unsqueeze(-1)
        return self.base(x_BTD) + (gate_BT1 * (x_BTD @ self.a_RD.T)) @ self.b_OR.T
