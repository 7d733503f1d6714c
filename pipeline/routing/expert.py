"""One expert, on disk and in memory.

A folder that stock tools load: PEFT's `adapter_config.json` and `adapter_model.safetensors`, beside them
`router.safetensors` (routing vectors by module path, prompt statistics), `expert.json` (the card) and `contents.json`
(what the others hold). Loading reads what routers always need, card and prompt statistics; the rest is read, or memory-mapped,
when it is looked up. Shapes: R rank, D input width, O output width, F prompt features.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.config import Config
from pipeline.errors import stored_file
from pipeline.files import atomic_folder, current_folder
from pipeline.routing.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    REMEDY,
    Adapter,
    ExpertError,
    StoredAdapters,
    adapter_key,
    read_adapter_config,
)
from pipeline.routing.contents import Contents
from pipeline.routing.features import FEATURE_RULE
from pipeline.routing.statistics import PromptStatistics

ROUTER_WEIGHTS, CARD = "router.safetensors", "expert.json"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER_WEIGHTS, CARD)
FORMAT_VERSION = 2
"""Version of what the files of experts and pools hold."""
VERSIONS = {"format_version": FORMAT_VERSION, "feature_rule": FEATURE_RULE}
"""What a file must say of itself to be read."""
POOL_CARD = "pool.json"
"""The card of a pool, above the experts that it holds."""
T = TypeVar("T")


class OutdatedError(ExpertError):
    """Statistics that an older release took in another way; the message names the command that takes them anew."""


class ExpertCard(Config):
    """Where an expert comes from."""

    name: str
    """Name of the expert, that of its task."""
    task: str
    """Task it was trained on."""
    base_fingerprint: str
    """Fingerprint of the base's weights."""
    rank: int
    """LoRA rank."""
    alpha: float
    """LoRA alpha."""
    seed: int
    """Seed of weights and data order."""
    data_fingerprint: str
    """Fingerprint of the training rows."""
    config_digest: str
    """Digest of configuration, data and base."""
    identity: dict[str, Any] = {}
    """What `config_digest` stands for, by name; empty in experts of earlier releases."""
    trained_with: dict[str, Any] = {}
    """How it was computed (workers, ZeRO stage, precision, ...): told, and no part of what it is."""
    samples: int
    """Rows seen in the expert stage."""
    metrics: dict[str, float] = {}
    """Final losses and times of both stages."""
    format_version: int = FORMAT_VERSION
    """Version of the folder's files."""
    feature_rule: int = FEATURE_RULE
    """Version of the rule by which prompts became features (`features.FEATURE_RULE`)."""


@dataclass(frozen=True, eq=False)
class Expert:
    """A task's LoRA and what routers need to know of it."""

    card: ExpertCard
    adapter_config: dict[str, Any]
    """PEFT's adapter_config.json."""
    adapters: Mapping[str, Adapter]
    """LoRA by module path."""
    vectors: Mapping[str, Tensor]
    """Routing vector (D,) by module path."""
    statistics: PromptStatistics
    """Statistics of the task's prompts."""
    layer_statistics: Mapping[str, PromptStatistics] = field(default_factory=dict)
    """Statistics of the prompts as the language model's Linears see them, by module path."""

    def save(self, folder: str | Path) -> Path:
        """Writes the folder anew, all of it or nothing."""
        weights = {}
        for path, adapter in self.adapters.items():
            weights[adapter_key(path, "A")] = adapter.a_RD.contiguous()
            weights[adapter_key(path, "B")] = adapter.b_OR.contiguous()
        router = {f"vector.{path}": vector.contiguous() for path, vector in self.vectors.items()}
        router |= statistics_tensors(self.statistics) | layer_tensors(self.layer_statistics)
        with atomic_folder(Path(folder)) as staging:
            write_tensors(staging / ADAPTER_WEIGHTS, weights, metadata={"format": "pt"})
            (staging / ADAPTER_CONFIG).write_text(json.dumps(self.adapter_config, indent=2, sort_keys=True) + "\n")
            write_tensors(staging / ROUTER_WEIGHTS, router)
            (staging / CARD).write_text(self.card.model_dump_json(indent=2) + "\n")
            Contents.of(staging, FILES).write(staging)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, *, check: Callable[[str], None] | None = None) -> "Expert":
        """Reads a folder that `save` wrote; raises ExpertError where something is missing, or damaged.

        A file's bytes are compared with `contents.json` when it is first read; adapters, routing vectors and the Linears'
        statistics are read when they are first looked up. `check(name)` takes the place of that comparison.
        """
        folder = complete_folder(Path(folder))
        check = check or partial(check_file, folder)
        check(CARD)
        with stored_file(folder / CARD, REMEDY, ExpertError):
            said = json.loads((folder / CARD).read_text())
            check_versions(folder / CARD, said)
            card = ExpertCard.model_validate(said)
        check(ADAPTER_CONFIG)
        config, scaling = read_adapter_config(folder)
        adapters = StoredAdapters(folder / ADAPTER_WEIGHTS, scaling, partial(check, ADAPTER_WEIGHTS))
        check(ROUTER_WEIGHTS)
        router = folder / ROUTER_WEIGHTS
        with stored_file(router, REMEDY, ExpertError):
            statistics = statistics_of(read_some(router, "statistics."))
        return cls(
            card,
            config,
            adapters,
            Deferred(partial(vectors_in, router)),
            statistics,
            Deferred(partial(_layer_statistics, router)),
        )

    def check_trained(self) -> None:
        """Raises ExpertError if the expert learned nothing (every B zero) or holds a value that is not finite."""
        tensors = [t for a in self.adapters.values() for t in (a.a_RD, a.b_OR)] + list(self.vectors.values())
        if not all(torch.isfinite(t).all() for t in tensors):
            raise ExpertError(f"expert {self.card.name!r}: a weight is not finite; lower expert.learning_rate")
        if not any(bool(a.b_OR.any()) for a in self.adapters.values()):
            raise ExpertError(
                f"expert {self.card.name!r}: every LoRA B is zero, so it was never trained and its routing vector has no "
                "gradient; train it for at least one step with a learning rate above zero"
            )


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


def complete_folder(folder: Path) -> Path:
    """Returns where an expert's folder is now; raises ExpertError where one of its files is missing."""
    folder = current_folder(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise ExpertError(f"{folder}: {name} is missing; a complete expert has it (train the task again?)")
    return folder


def vectors_in(router: Path) -> dict[str, Tensor]:
    """Reads the routing vectors by module path from an expert's `router.safetensors`."""
    with stored_file(router, REMEDY, ExpertError):
        return {key.removeprefix("vector."): vector for key, vector in read_some(router, "vector.").items()}


def _layer_statistics(router: Path) -> dict[str, PromptStatistics]:
    with stored_file(router, REMEDY, ExpertError):
        return layer_statistics_of(read_some(router, "evidence."))


def check_file(folder: Path, name: str) -> None:
    """Raises ExpertError where a file of an expert does not hold what `contents.json` says; folders may be without it."""
    with stored_file(folder / name, REMEDY, ExpertError):
        contents = Contents.read(folder)
        if contents is not None:
            contents.check(folder, name)


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


def check_versions(file: Path, said: Mapping[str, Any]) -> None:
    """Raises ExpertError where a file says that its format or feature rule is another one than this code's.

    It is an OutdatedError, whose message names the pool that the file lies in, if the file is older.
    """
    for name, version in VERSIONS.items():
        found = said.get(name, 1)
        if str(found) == str(version):
            continue
        told = f"{file}: {name} is {found}, this code reads {version}"
        if is_newer(found, version):
            raise ExpertError(f"{told}: a newer release wrote it; install that one")
        pool = next((folder for folder in file.parents[:3] if (folder / POOL_CARD).is_file()), None)
        raise OutdatedError(
            f"{told}: statistics of prompts were taken in another way and cannot be compared; `pointsman "
            f"recompute-statistics CONFIG --pool {pool or 'POOL'}` takes them anew from each task's rows, without training "
            f"(CONFIG: the stream's YAML file{'' if pool else '; POOL: the pool that holds the expert'})"
        )


def is_newer(found: Any, version: int) -> bool:
    """Returns whether a version that a file gives, as a number or as text, is beyond `version`."""
    return str(found).isdigit() and int(found) > version


def statistics_tensors(statistics: PromptStatistics, name: str = "statistics") -> dict[str, Tensor]:
    """Returns statistics as named tensors for a safetensors file: half the scatter (it is symmetric), in float32.

    In files the threshold is called `radius`, and the statistics of Linears `evidence`, as earlier releases wrote them.
    """
    row, column = torch.triu_indices(statistics.width, statistics.width)
    return {
        f"{name}.count": torch.tensor([statistics.count]),
        f"{name}.pictures": torch.tensor([statistics.independent]),
        f"{name}.mean": statistics.mean_F.contiguous(),
        f"{name}.scatter": statistics.scatter_FF[row, column].float(),
        f"{name}.radius": torch.tensor([statistics.threshold], dtype=torch.float64),
    }


def statistics_of(tensors: Mapping[str, Tensor], name: str = "statistics") -> PromptStatistics:
    """Reads what `statistics_tensors` wrote; raises KeyError where it is not there."""
    mean_F = tensors[f"{name}.mean"]
    scatter_FF = torch.zeros(len(mean_F), len(mean_F), dtype=torch.float64)
    row, column = torch.triu_indices(*scatter_FF.shape)
    scatter_FF[row, column] = scatter_FF[column, row] = tensors[f"{name}.scatter"].double()
    count, threshold = int(tensors[f"{name}.count"]), float(tensors[f"{name}.radius"])
    pictures = int(tensors.get(f"{name}.pictures", count))  # earlier releases did not count them
    return PromptStatistics(count, mean_F, scatter_FF, threshold, pictures)


def layer_tensors(layer_statistics: Mapping[str, PromptStatistics]) -> dict[str, Tensor]:
    """Returns the statistics of all Linears as named tensors."""
    return {
        key: value
        for path, own in layer_statistics.items()
        for key, value in statistics_tensors(own, f"evidence.{path}").items()
    }


def layer_statistics_of(tensors: Mapping[str, Tensor]) -> dict[str, PromptStatistics]:
    """Reads what `layer_tensors` wrote."""
    names = [key.removesuffix(".mean") for key in tensors if key.startswith("evidence.") and key.endswith(".mean")]
    return {name.removeprefix("evidence."): statistics_of(tensors, name) for name in sorted(names)}
