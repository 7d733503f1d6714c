"""How experts and pools lie in safetensors files: tensors, statistics, and the version of the format.

Shapes: F prompt features.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.routing.adapters import (
    ExpertError,
)
from pipeline.routing.features import FEATURE_RULE
from pipeline.routing.statistics import PromptStatistics, upper_half

FORMAT_VERSION = 2
"""Version of what the files of experts and pools hold."""
VERSIONS = {"format_version": FORMAT_VERSION, "feature_rule": FEATURE_RULE}
"""What a file must say of itself to be read."""
POOL_CARD = "pool.json"
"""The card of a pool, above the experts that it holds."""
T = TypeVar("T")


class OutdatedError(ExpertError):
    """Statistics that an older release took in another way; the message names the command that takes them anew."""


class Deferred(Mapping[str, T]):
    """A mapping that is read when it is first looked into."""

    def __init__(self, read: Callable[[], Mapping[str, T]]) -> None:
        self._read = read

    @cached_property
    def _values(self) -> Mapping[str, T]:
        return self._read()

    def __getitem__(self, key: str) -> T:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that has the usual rights; `save_file` makes one that only its owner can read."""
    file.write_bytes(save(dict(tensors), metadata=metadata))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file and its metadata."""
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def read_some(file: Path, prefix: str) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file whose names begin with `prefix`."""
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(prefix)}  # noqa: SIM118


def check_versions(file: Path, fields: Mapping[str, Any]) -> None:
    """Raises ExpertError where a file says that its format or feature rule is another one than this code's.

    It is an OutdatedError, whose message names the pool that the file lies in, if the file is older.
    """
    for name, version in VERSIONS.items():
        version_there = fields.get(name, 1)
        if str(version_there) == str(version):
            continue
        problem = f"{file}: {name} is {version_there}, this code reads {version}"
        if is_newer(version_there, version):
            raise ExpertError(f"{problem}: a newer release wrote it; install that one")
        pool = next((folder for folder in file.parents[:3] if (folder / POOL_CARD).is_file()), None)
        raise OutdatedError(
            f"{problem}: statistics of prompts were taken in another way and cannot be compared; `pointsman "
            f"recompute-statistics CONFIG --pool {pool or 'POOL'}` takes them anew from each task's rows, without training "
            f"(CONFIG: the stream's YAML file{'' if pool else '; POOL: the pool that holds the expert'})"
        )


def is_newer(version_there: Any, version: int) -> bool:
    """Returns whether a version that a file gives, as a number or as text, is beyond `version`."""
    return str(version_there).isdigit() and int(version_there) > version


def statistics_tensors(statistics: PromptStatistics, name: str = "statistics") -> dict[str, Tensor]:
    """Returns statistics as named tensors for a safetensors file: half the scatter (it is symmetric), in float32.

    In files the threshold is called `radius`, and the statistics of Linears `evidence`, as earlier releases wrote them.
    """
    tensors = {
        f"{name}.count": torch.tensor([statistics.count]),
        f"{name}.pictures": torch.tensor([statistics.independent]),
        f"{name}.mean": statistics.mean_F.contiguous(),
        f"{name}.scatter": statistics.scatter_FF[upper_half(statistics.width)].float(),
        f"{name}.radius": torch.tensor([statistics.threshold], dtype=torch.float64),
    }
    if statistics.with_image is not None:
        tensors[f"{name}.with_image"] = torch.tensor([statistics.with_image])
    return tensors


def statistics_of(tensors: Mapping[str, Tensor], name: str = "statistics") -> PromptStatistics:
    """Reads what `statistics_tensors` wrote; raises KeyError where it is not there."""
    return _described(tensors, name, _symmetric(tensors[f"{name}.scatter"], len(tensors[f"{name}.mean"])))


def _described(tensors: Mapping[str, Tensor], name: str, scatter: Tensor) -> PromptStatistics:
    count, threshold = int(tensors[f"{name}.count"]), float(tensors[f"{name}.radius"])
    images = int(tensors.get(f"{name}.pictures", count))  # earlier releases did not count them
    with_image = int(tensors[f"{name}.with_image"]) if f"{name}.with_image" in tensors else None
    return PromptStatistics(count, tensors[f"{name}.mean"], scatter, threshold, images, with_image)


def _symmetric(half: Tensor, width: int) -> Tensor:
    """Returns a symmetric matrix (F, F), float64, of its upper half."""
    whole_FF = torch.empty(width, width, dtype=torch.float64)
    row, column = upper_half(width)
    whole_FF[row, column] = whole_FF[column, row] = half.double()
    return whole_FF


def read_statistics(file: Path) -> PromptStatistics:
    """Reads what `statistics_tensors` wrote but the scatter, which is empty; raises KeyError where it is not there."""
    tensors: dict[str, Tensor] = {}
    for part in ("count", "mean", "radius", "pictures", "with_image"):
        tensors |= read_some(file, f"statistics.{part}")
    return _described(tensors, "statistics", torch.zeros(0))


def read_scatter(file: Path) -> Tensor:
    """Reads the scatter (F, F), float64; raises KeyError where it is not there."""
    half = read_some(file, "statistics.scatter")["statistics.scatter"]
    return _symmetric(half, round((2 * len(half) + 0.25) ** 0.5 - 0.5))


class StoredStatistics(PromptStatistics):
    """Statistics in a file: all but the scatter is read when it is first asked for, the scatter each time it is.

    The scatters of a pool's experts together may be larger than memory.
    """

    _read: Callable[[], PromptStatistics]
    _read_scatter: Callable[[], Tensor]

    def __init__(self, read: Callable[[], PromptStatistics], read_scatter: Callable[[], Tensor]) -> None:
        object.__setattr__(self, "_read", read)  # what it is derived from is frozen
        object.__setattr__(self, "_read_scatter", read_scatter)

    @cached_property
    def _small(self) -> PromptStatistics:
        return self._read()

    @property
    def count(self) -> int:
        """Number of prompts N."""
        return self._small.count

    @property
    def mean_F(self) -> Tensor:
        """Mean of the features (F,)."""
        return self._small.mean_F

    @property
    def scatter_FF(self) -> Tensor:
        """Sum of outer products of the centred features (F, F)."""
        return self._read_scatter()

    @property
    def threshold(self) -> float:
        """Squared own distance that only few of the own prompts exceed."""
        return self._small.threshold

    @property
    def images(self) -> int | None:
        """Number of distinct images."""
        return self._small.images

    @property
    def with_image(self) -> int | None:
        """Number of prompts with an image."""
        return self._small.with_image


def layer_tensors(layer_statistics: Mapping[str, PromptStatistics]) -> dict[str, Tensor]:
    """Returns the statistics of all Linears as named tensors."""
    return {
        key: value
        for path, statistics in layer_statistics.items()
        for key, value in statistics_tensors(statistics, f"evidence.{path}").items()
    }


def layer_statistics_of(tensors: Mapping[str, Tensor]) -> dict[str, PromptStatistics]:
    """Reads what `layer_tensors` wrote."""
    names = [key.removesuffix(".mean") for key in tensors if key.startswith("evidence.") and key.endswith(".mean")]
    return {name.removeprefix("evidence."): statistics_of(tensors, name) for name in sorted(names)}
