"""Placement of a base that is larger than one device.

Parts are not split and stay in order: vision tower and embeddings, the decoder's layers one by one, norm and head. So a
forward pass crosses from each device to the next once.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from pipeline.models.families import Family

CPU = "cpu"


def split(sizes: Sequence[int], count: int) -> list[int]:
    """Returns the device (0 to count - 1) of each part by its size; parts stay in order, devices get about equal sizes.

    A part goes where its middle falls when the sum is cut into `count` equal pieces.
    """
    piece = max(1, sum(sizes)) / count
    ends = accumulate(sizes)
    return [min(count - 1, int((end - size / 2) / piece)) for size, end in zip(sizes, ends, strict=True)]


def largest_share(sizes: Sequence[int], count: int) -> int:
    """Returns the size on the fullest of `count` devices."""
    shares = [0] * count
    for size, device in zip(sizes, split(sizes, count), strict=True):
        shares[device] += size
    return max(shares)


def device_map(model: Any, family: Family, devices: Sequence[str], *, vision: bool = True) -> dict[str, str]:
    """Returns the device of every part of a model (on the meta device, or loaded) by its path.

    Without `vision` the vision parts stay on the CPU, to be dropped. A head tied to the embeddings stays beside them, and so
    do modules without weights (rotary frequencies, which layers receive from there).
    """
    layers = f"{family.language}.layers"
    parts: list[list[str]] = [[]]  # each inner list shares a device
    seen_layers = False
    for path in _parts(model, (layers, *family.vision)):
        if path.startswith(f"{layers}."):
            parts.append([path])
            seen_layers = True
        elif path in family.vision and not vision:
            continue
        elif seen_layers and _size(model.get_submodule(path)) and not _tied(model, path):
            parts.append([path])
        else:
            parts[0].append(path)
    sizes = [sum(_size(model.get_submodule(path)) for path in part) for part in parts]
    placed = dict.fromkeys(() if vision else family.vision, CPU)
    for part, device in zip(parts, split(sizes, len(devices)), strict=True):
        placed |= dict.fromkeys(part, devices[device])
    return placed


def _parts(module: nn.Module, kept_apart: Sequence[str], prefix: str = "") -> list[str]:
    """Returns the paths of the largest modules that contain none of `kept_apart`; of a list of layers each layer."""
    paths = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        holds = any(other.startswith(f"{path}.") for other in kept_apart)
        paths += _parts(child, kept_apart, f"{path}.") if holds or isinstance(child, nn.ModuleList) else [path]
    return paths


def _tied(model: Any, path: str) -> bool:
    """Whether a module shares its weight with the input embeddings."""
    return getattr(model.get_submodule(path), "weight", None) is model.get_input_embeddings().weight


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
