"""What all ranks of a training know alike."""

from typing import Any

import torch
import torch.distributed as dist


def agreed(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def summed(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum of float64 values over all ranks."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
