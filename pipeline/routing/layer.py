"""The routed Linear: a frozen Linear with any number of LoRA experts beside it.

    y = W x + sum_e w_e s_e B_e A_e x        as        ((w (x) 1_r) o (x A_cat^T)) B_cat^T

    x (B, T, D) --+-- W ------------------------------------------------(+)-- y (B, T, O)
                  |                                                      |
                  +-- [A_cat; LN(V)] --+-- (B, T, SR) -- o w[slot] -- B_cat
                                       +-- (B, T, E)  -- token router -> w

Down-projections and scores are one product, the masked up-projection another: two skinny products whatever k and E are,
and nothing of shape (tokens, experts, O). Slots: an expert of rank r owns r rows of A_cat, so experts of different ranks
stand side by side, and an expert without this Linear owns none here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.routing.token_router import normalise_vector, token_weights


@dataclass
class Route:
    """How the current batch is routed; one object shared by all routed Linears of a model."""

    mode: Literal["token", "row"] = "row"
    """`token`: every Linear decides by its routing vectors; `row`: `weights_BE` holds for all Linears and tokens."""
    top_k: int = 2
    temperature: float = 1.0
    weights_BE: Tensor | None = None
    """Row mode: weights of all the pool's experts (B, E)."""
    tokens_BT: Tensor | None = None
    """Token mode, prefill: mask of the real tokens; None while decoding."""
    votes_BE: Tensor | None = field(default=None, repr=False)
    """Token mode: sum over Linears of the mean weights over the prompt's tokens (B, E), for insight."""


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
    up_OR: Tensor
    local_R: Tensor
    pool_E: Tensor

    def __init__(self, base: nn.Linear, slots: Sequence[Slot], route: Route, pool_size: int) -> None:
        super().__init__()
        self.base = base
        self.route = route
        self.pool_size = pool_size
        kind: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.rows = sum(len(slot.a_RD) for slot in slots)
        vectors_ED = [normalise_vector(slot.vector_D.float())[None] for slot in slots]
        down = torch.cat([*(slot.a_RD for slot in slots), *vectors_ED]).to(**kind)
        up = torch.cat([slot.scaling * slot.b_OR.float() for slot in slots], dim=1).to(**kind)
        local = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor([len(slot.a_RD) for slot in slots]))
        self.register_buffer("down_SD", down, persistent=False)
        self.register_buffer("up_OR", up, persistent=False)
        self.register_buffer("local_R", local.to(base.weight.device), persistent=False)
        self.register_buffer(
            "pool_E", torch.tensor([slot.expert for slot in slots], device=base.weight.device), persistent=False
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        y_BTO = self.base(x_BTD)
        if self.route.mode == "row":
            if self.route.weights_BE is None:
                return y_BTO
            h_BTR = x_BTD @ self.down_SD[: self.rows].T
            weights_BTE = self.route.weights_BE[:, self.pool_E].unsqueeze(1)
        else:
            h_BTS = x_BTD @ self.down_SD.T
            h_BTR, products_BTE = h_BTS.split([self.rows, len(self.pool_E)], dim=-1)
            weights_BTE = token_weights(products_BTE, x_BTD, top_k=self.route.top_k, temperature=self.route.temperature)
            self._vote(weights_BTE)
        return y_BTO + (h_BTR * weights_BTE[..., self.local_R].to(h_BTR.dtype)) @ self.up_OR.T

    def _vote(self, weights_BTE: Tensor) -> None:
        """Adds this Linear's mean weights over the prompt's tokens to the route's votes."""
        tokens_BT = self.route.tokens_BT
        if tokens_BT is None or tokens_BT.shape != weights_BTE.shape[:2]:
            return
        tokens_BT1 = tokens_BT.unsqueeze(-1).float()
        mean_BE = (weights_BTE * tokens_BT1).sum(1) / tokens_BT1.sum(1).clamp(min=1)
        if self.route.votes_BE is None:
            self.route.votes_BE = mean_BE.new_zeros(len(mean_BE), self.pool_size)
        self.route.votes_BE.index_add_(1, self.pool_E, mean_BE)


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
