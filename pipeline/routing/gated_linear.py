"""The router stage's Linear: it trains one routing vector.

Shapes: B rows, T tokens, D and O widths of the Linear, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn


class GatedLinear(nn.Module):
    """The router stage's Linear: base and expert frozen, one trainable routing vector.

    y_t = W x_t + sigmoid(<x_t, v>) s B A x_t, v zero at the start (PHATGOOSE, arXiv 2402.05859, section 3.1).
    """

    a_RD: Tensor
    b_OR: Tensor

    def __init__(
        self, base: nn.Linear, a_RD: Tensor, b_OR: Tensor, scaling: float, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.base = base
        like: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.register_buffer("a_RD", a_RD.to(**like), persistent=False)
        self.register_buffer("b_OR", (scaling * b_OR.float()).to(**like), persistent=False)
        self.vector = nn.Parameter(torch.zeros(a_RD.shape[1], **(like if dtype is None else like | {"dtype": dtype})))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        # One product for both: its backward pass makes one gradient as large as x, not two. In the precision of x, which
        # may be another one than that of the vector.
        down_SD = torch.cat([self.a_RD.to(x_BTD.dtype), self.vector[None].to(x_BTD.dtype)])
        low_BTR, score_BT1 = (x_BTD @ down_SD.T).tensor_split([-1], dim=-1)
        return self.base(x_BTD) + (torch.sigmoid(score_BT1) * low_BTR) @ self.b_OR.T.to(x_BTD.dtype)
