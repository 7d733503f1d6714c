"""Which device holds which part of a base that is larger than one device.

The parts stay whole and in order: vision tower and embeddings, the decoder's layers one by one, norm and head. A prompt
then passes from each device to the next once.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from pipeline.models.families import Family

CPU = "cpu"


def split(sizes: Sequence[int], count: int) -> list[int]:
    """Returns for parts of these sizes, in their order, which of `count` devices holds each; every device gets about as much.

    A part goes where its middle falls when the whole is cut into `count` equal pieces.
    """
    piece = max(1, sum(sizes)) / count
    ends = accumulate(sizes)
    return [min(count - 1, int((end - size / 2) / piece)) for size, end in zip(sizes, ends, strict=True)]


def largest_share(sizes: Sequence[int], count: int) -> int:
    """Returns the size of what the fullest of `count` devices holds."""
    shares = [0] * count
    for size, device in zip(sizes, split(sizes, count), strict=True):
        shares[device] += size
    return max(shares)


def device_map(model: Any, family: Family, devices: Sequence[str], *, vision: bool = True) -> dict[str, str]:
    """Returns the device of every part of a model (on the meta device, or loaded) by its path.

    Without `vision` the parts that see images are to be thrown away, and wait on the CPU. A head that is tied to the
    embeddings stays beside them, and so does what has no weights (rotary frequencies: layers get them from there).
    """
    layers = f"{family.language}.layers"
    parts: list[list[str]] = [[]]  # those that must share a device stand together
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
    """Returns the paths of the largest modules that do not hold any of `wanted`; of a list of layers each layer."""
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
