"""What training has made of experts and their pool, whatever the version of their statistics.

LoRA and routing vectors do not depend on how prompts become features; only statistics do. So a pool that this code refuses
to route by still holds all that took a GPU to compute.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from torch import Tensor

from pipeline.config import Config, digest
from pipeline.errors import stored_file
from pipeline.files import current_folder
from pipeline.routing.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    REMEDY,
    Adapter,
    ExpertError,
    StoredAdapters,
    read_adapter_config,
)
from pipeline.routing.expert import CARD as EXPERT_CARD
from pipeline.routing.expert import ROUTER_WEIGHTS, Expert, ExpertCard, check_file, complete_folder, vectors_in
from pipeline.routing.pool import CARD as POOL_CARD
from pipeline.routing.pool import EXPERTS, REFERRING, PoolError
from pipeline.routing.pool import REMEDY as POOL_REMEDY
from pipeline.routing.serialization import FORMAT_VERSION, VERSIONS, is_newer
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.store import ExpertReference, ExpertStore, OwnExperts, cache_folder


@dataclass(frozen=True, eq=False)
class TrainedExpert:
    """A task's LoRA and routing vectors, without statistics."""

    card: ExpertCard
    """As it was written, its versions too."""
    adapter_config: dict[str, Any]
    """PEFT's adapter_config.json."""
    adapters: Mapping[str, Adapter]
    """LoRA by module path."""
    vectors: Mapping[str, Tensor]
    """Routing vector (D,) by module path."""

    @classmethod
    def load(cls, folder: Path) -> "TrainedExpert":
        """Reads an expert's folder; raises ExpertError where something is missing, damaged, or of a newer format."""
        folder = complete_folder(folder)
        check_file(folder, EXPERT_CARD)
        with stored_file(folder / EXPERT_CARD, REMEDY, ExpertError):
            fields = json.loads((folder / EXPERT_CARD).read_text())
            _check_format(folder / EXPERT_CARD, fields, FORMAT_VERSION)
            card = ExpertCard.model_validate(
                dict.fromkeys(VERSIONS, 1) | fields
            )  # the first version had no such fields
        check_file(folder, ADAPTER_CONFIG)
        config, scaling = read_adapter_config(folder)
        adapters = StoredAdapters(folder / ADAPTER_WEIGHTS, scaling, partial(check_file, folder, ADAPTER_WEIGHTS))
        check_file(folder, ROUTER_WEIGHTS)
        return cls(card, config, adapters, vectors_in(folder / ROUTER_WEIGHTS))

    @property
    def up_to_date(self) -> bool:
        """Whether its statistics are of this code's versions."""
        return self.card.model_dump(include=set(VERSIONS)) == VERSIONS

    def described(
        self,
        statistics: PromptStatistics,
        layer_statistics: Mapping[str, PromptStatistics],
        *,
        identity: Mapping[str, Any],
    ) -> Expert:
        """Returns the expert with these statistics, of this code's versions; `identity` is what it depends on, by name."""
        named = {"identity": dict(identity), "config_digest": digest(dict(identity))}
        card = self.card.model_copy(update=named | VERSIONS)
        return Expert(card, self.adapter_config, self.adapters, self.vectors, statistics, layer_statistics)


class _Contents(Config):
    """What is needed of `pool.json`; router settings of other versions may have other fields."""

    model_config = ConfigDict(extra="ignore")

    base_label: str
    base_fingerprint: str
    router: dict[str, Any]
    experts: tuple[ExpertReference, ...] = ()
    store: str | None = None
    null: bool = False


@dataclass(frozen=True)
class TrainedPool:
    """A pool's folder and its experts, which are read one at a time."""

    folder: Path
    base_label: str
    """Name of the base in the registry."""
    base_fingerprint: str
    """Fingerprint of the base's weights."""
    router: dict[str, Any]
    """Router settings, with the fields that they had."""
    experts: Mapping[str, ExpertReference]
    """References to the experts by name, in order of arrival."""
    null: bool
    """Whether it has statistics of base prompts."""
    store: ExpertStore
    """Where those lie that the folder does not hold."""

    @classmethod
    def load(cls, folder: Path, store: ExpertStore | None = None) -> "TrainedPool":
        """Reads a pool's card; raises PoolError where there is none, or it is damaged, ExpertError for a newer format.

        `store` is as in `Pool.load`.
        """
        folder = current_folder(folder)
        file = folder / POOL_CARD
        if not file.is_file():
            raise PoolError(f"{folder}: no {POOL_CARD}, so not a pool folder")
        with stored_file(file, POOL_REMEDY, PoolError):
            fields = json.loads(file.read_text())
            _check_format(file, fields, REFERRING)
            card = _Contents.model_validate(fields)
        there = folder / card.store if card.store is not None else None
        store = store or ExpertStore(there if there is not None and there.is_dir() else cache_folder())
        experts = {reference.name: reference for reference in card.experts}
        return cls(folder, card.base_label, card.base_fingerprint, card.router, experts, card.null, store)

    def expert(self, name: str) -> TrainedExpert:
        """Reads an expert; raises ExpertError if it is missing or damaged."""
        return TrainedExpert.load(self.folder_of(name))

    def folder_of(self, name: str) -> Path:
        """Returns the folder of an expert, fetched if need be; raises ExpertError if it is missing."""
        reference, contained = self.experts[name], OwnExperts(self.folder / EXPERTS)
        held = reference.digest is None or contained.folder_of(reference).is_dir()
        return contained.folder_of(reference) if held else self.store.ensure(reference)


def _check_format(file: Path, fields: Mapping[str, Any], newest: int) -> None:
    version = fields.get("format_version", 1)
    if is_newer(version, newest):
        raise ExpertError(
            f"{file}: format_version is {version}, this code reads up to {newest}: a newer release wrote it; install that one"
        )
