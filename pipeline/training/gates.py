"""Gates on the base: a gated Linear with a routing vector in place of every Linear that an expert changes."""

from collections.abc import Mapping

import torch
from torch import nn

from pipeline.routing.adapters import Adapter
from pipeline.routing.gated_linear import GatedLinear


def with_gates(
    model: nn.Module, adapters: Mapping[str, Adapter], *, dtype: torch.dtype | None = None
) -> dict[str, GatedLinear]:
    """Puts a gated Linear in place of every Linear that one of `adapters` changes; returns them by path.

    Their routing vectors are in `dtype`; default: the base's.
    """
    model.requires_grad_(False)
    gates = {}
    for path, lora in adapters.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        gates[path] = GatedLinear(linear, lora.a_RD, lora.b_OR, lora.scaling, dtype=dtype)
        model.set_submodule(path, gates[path])
    return gates


def without_gates(model: nn.Module, gates: Mapping[str, GatedLinear]) -> None:
    """Puts the Linears back that `with_gates` replaced."""
    for path, gate in gates.items():
        model.set_submodule(path, gate.base)
