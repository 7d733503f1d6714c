"""One expert, on disk and in memory.

A folder that stock tools load: PEFT's `adapter_config.json` and `adapter_model.safetensors`, beside them
`router.safetensors` (routing vectors by module path, prompt statistics), `expert.json` (the card) and `contents.json`
(what the others hold). Loading reads the card and PEFT's configuration; the rest is read, or memory-mapped, when it is looked
up. Shapes: R rank, D input width, O output width, F prompt features.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from pipeline.routing.serialization import (
    FORMAT_VERSION,
    Deferred,
    StoredStatistics,
    check_versions,
    layer_statistics_of,
    layer_tensors,
    read_scatter,
    read_some,
    read_statistics,
    statistics_tensors,
    write_tensors,
)
from pipeline.routing.statistics import PromptStatistics

ROUTER_WEIGHTS, CARD = "router.safetensors", "expert.json"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER_WEIGHTS, CARD)


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
    """How it was computed (workers, ZeRO stage, precision, ...): recorded, not part of its identity."""
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

        A file's bytes are compared with `contents.json` when it is first read; adapters, routing vectors and statistics are
        read when they are first looked up. `check(name)` takes the place of that comparison.
        """
        folder = complete_folder(Path(folder))
        check = check or partial(check_file, folder)
        check(CARD)
        with stored_file(folder / CARD, REMEDY, ExpertError):
            fields = json.loads((folder / CARD).read_text())
            check_versions(folder / CARD, fields)
            card = ExpertCard.model_validate(fields)
        check(ADAPTER_CONFIG)
        config, scaling = read_adapter_config(folder)
        adapters = StoredAdapters(folder / ADAPTER_WEIGHTS, scaling, partial(check, ADAPTER_WEIGHTS))
        router = _RouterFile(folder / ROUTER_WEIGHTS, partial(check, ROUTER_WEIGHTS))
        return cls(
            card,
            config,
            adapters,
            Deferred(router.vectors),
            StoredStatistics(router.statistics, router.scatter),
            Deferred(router.layer_statistics),
        )

    def adapter_alone(self) -> "Expert":
        """Returns the expert with LoRA and prompt statistics in memory, and nothing else that routers need: it can be sent."""
        s = self.statistics
        statistics = PromptStatistics(s.count, s.mean_F, s.scatter_FF, s.threshold, s.images, s.with_image)
        return replace(self, adapters=dict(self.adapters), vectors={}, statistics=statistics, layer_statistics={})

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


def complete_folder(folder: Path) -> Path:
    """Returns where an expert's folder is now; raises ExpertError where one of its files is missing."""
    folder = current_folder(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise ExpertError(f"{folder}: {name} is missing; {REMEDY}")
    return folder


class _RouterFile:
    """An expert's `router.safetensors`, checked before it is first read."""

    def __init__(self, file: Path, check: Callable[[], None]) -> None:
        self._file, self._check, self._is_checked = file, check, False

    @contextmanager
    def _checked(self) -> Iterator[Path]:
        """Yields the file; raises ExpertError where it is missing or damaged."""
        with stored_file(self._file, REMEDY, ExpertError):
            if not self._is_checked:
                self._check()
                self._is_checked = True
            yield self._file

    def vectors(self) -> dict[str, Tensor]:
        """Reads the routing vectors by module path."""
        with self._checked() as file:
            return {key.removeprefix("vector."): vector for key, vector in read_some(file, "vector.").items()}

    def statistics(self) -> PromptStatistics:
        """Reads the prompts' statistics but their scatter."""
        with self._checked() as file:
            return read_statistics(file)

    def scatter(self) -> Tensor:
        """Reads the prompts' scatter (F, F)."""
        with self._checked() as file:
            return read_scatter(file)

    def layer_statistics(self) -> dict[str, PromptStatistics]:
        """Reads the Linears' statistics by module path."""
        with self._checked() as file:
            return layer_statistics_of(read_some(file, "evidence."))


def vectors_in(router: Path) -> dict[str, Tensor]:
    """Reads the routing vectors by module path from an expert's `router.safetensors`."""
    return _RouterFile(router, lambda: None).vectors()


def check_file(folder: Path, name: str) -> None:
    """Raises ExpertError where a file of an expert does not hold what `contents.json` says; folders may be without it."""
    with stored_file(folder / name, REMEDY, ExpertError):
        contents = Contents.read(folder)
        if contents is not None:
            contents.check(folder, name)
