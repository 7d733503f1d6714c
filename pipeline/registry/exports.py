"""Pools and experts as folders for others: `pool` for this project elsewhere, `peft` for stock PEFT, `vllm` for its server.

An export appears whole or not at all. One expert is in memory at a time.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from pipeline.files import atomic_folder, write_json
from pipeline.models.stock_processor import PROCESSOR_FILES, complete_processor
from pipeline.registry import usage
from pipeline.registry.bases import download_base_files, find_base, public_name
from pipeline.registry.experts import reference_to, registered_experts
from pipeline.registry.export_record import ExportError, ExportRecord
from pipeline.registry.loading import download_pool, read_pool
from pipeline.registry.names import read_name
from pipeline.registry.retries import RegistryError
from pipeline.registry.usage import PROCESSOR, Shared, described
from pipeline.registry.versions import MODELS, logged_model
from pipeline.routing.adapters import ranks_of
from pipeline.routing.peft_folder import write_peft_folder
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference, StoredExpert

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has kernels for (`MaxLoRARanks` in its `vllm/config/lora.py`, release 0.33)."""

ADAPTERS = "adapters"
"""Folder of the experts in an export for vLLM."""


class ExportFormat(StrEnum):
    """For whom."""

    PEFT = "peft"
    VLLM = "vllm"
    POOL = "pool"


@dataclass(frozen=True)
class Export:
    """What to export, looked up in the registry; `write` writes it."""

    source: ModelVersion
    format: ExportFormat
    base: ModelVersion
    base_name: str
    """What `adapter_config.json` calls the base."""
    fingerprint: str
    """Of the base."""
    pool: Pool | None
    experts: dict[str, StoredExpert]
    """Those to export, by name."""

    @property
    def record(self) -> ExportRecord:
        """What the folder says that it is."""
        return ExportRecord(
            format=self.format,
            source=f"{self.source.name}/{self.source.version}",
            base_name=self.base_name,
            experts={name: str(entry.reference.digest) for name, entry in self.experts.items()},
        )

    def write(self, folder: Path, on_expert: Callable[[str], None] = lambda name: None) -> bool:
        """Writes the folder; returns whether it was there already. `on_expert` hears of each expert that is written.

        Raises ExportError where the folder holds anything else.
        """
        if self.record.is_in(folder):
            return True
        write = {
            ExportFormat.POOL: self._write_pool,
            ExportFormat.PEFT: self._write_peft,
            ExportFormat.VLLM: self._write_vllm,
        }
        with atomic_folder(folder.absolute()) as staging:
            write[self.format](staging, on_expert)
            self.record.write(staging)
        return False

    def _write_pool(self, folder: Path, on_expert: Callable[[str], None]) -> None:
        assert self.pool is not None, "checked when it was looked up"
        pool = self.pool
        for name in pool.names:
            if name not in self.experts:
                pool = pool.remove(name)
        pool.export(folder, on_expert)
        (folder / "README.md").write_text(usage.pool_page(self._shared(None), pool))

    def _write_peft(self, folder: Path, on_expert: Callable[[str], None]) -> None:
        shared = self._shared(folder / PROCESSOR)
        for name, entry in self.experts.items():
            on_expert(name)
            adapters = entry.read().adapters
            write_peft_folder(folder / name, adapters, base_name=self.base_name)
            page = usage.expert_page(shared, described(entry.reference), max(ranks_of(adapters).values()))
            (folder / name / "README.md").write_text(page)
        (folder / "README.md").write_text(usage.peft_page(shared, list(self.experts)))

    def _write_vllm(self, folder: Path, on_expert: Callable[[str], None]) -> None:
        """Writes an adapter per expert version: vLLM caches prefixes by an adapter's name, so a changed one needs another."""
        served = {}
        for name, entry in self.experts.items():
            on_expert(name)
            adapters = entry.read().adapters
            rank = vllm_rank(name, max(ranks_of(adapters).values()), next(iter(adapters.values())).scaling)
            write_peft_folder(
                folder / ADAPTERS / model_id(entry.reference), adapters, base_name=self.base_name, rank=rank
            )
            served[name] = rank
        write_json(folder / "manifest.json", self._manifest(served))
        write_json(folder / "router.json", self._router())
        (folder / "README.md").write_text(usage.vllm_page(self._shared(None), self._manifest(served)))

    def _manifest(self, ranks: dict[str, int]) -> dict[str, Any]:
        """What the server must be started with, and what it then answers to."""
        return {
            "served_model_name": self.base_name,
            "lora_resolver_cache_dir": ADAPTERS,
            "max_lora_rank": max(ranks.values()),
            "models": [
                {
                    "id": model_id(entry.reference),
                    "task": name,
                    "version": entry.reference.version,
                    "rank": ranks[name],
                    "path": f"{ADAPTERS}/{model_id(entry.reference)}",
                }
                for name, entry in self.experts.items()
            ],
        }

    def _router(self) -> dict[str, Any]:
        """Which model answers the prompts of which task: for whoever routes in front of the server."""
        retired = self.pool.retired if self.pool is not None else ()
        answers = {name: model_id(entry.reference) for name, entry in self.experts.items()}
        return {"base": self.base_name, "tasks": answers | dict.fromkeys(retired, self.base_name)}

    def _shared(self, processor: Path | None) -> Shared:
        """Gathers what all pages say; copies the base's processor files to the folder `processor`."""
        name = None
        if processor is not None:
            download_base_files(self.base, PROCESSOR_FILES, processor)
            name = complete_processor(processor)
        return Shared(
            source=f"{self.source.name}/{self.source.version}",
            base_name=self.base_name,
            base_version=f"{self.base.name}/{self.base.version}",
            base_fingerprint=self.fingerprint,
            processor_class=name,
        )


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def prepare_export(
    version: ModelVersion,
    format: ExportFormat,
    scratch: Path,
    *,
    experts: Sequence[str] = (),
    base_name: str | None = None,
) -> Export:
    """Looks up what to export of a version of a pool or of an expert; `experts` chooses some of a pool's.

    `base_name` is what adapters shall call their base instead of `bases.public_name`. `scratch` holds the pool's own files.
    Raises RegistryError for other models, ExportError for what a format cannot hold.
    """
    if base_name is not None and not _HUB_ID.fullmatch(base_name):
        raise ExportError(
            f"--base-name {base_name}: give the base's hub id or another name, like OpenGVLab/InternVL2-8B; a path would "
            "hold on this machine only"
        )
    named, params = read_name(version.name), logged_model(version).params
    if named is None or named.kind == "base" or "base_fingerprint" not in params:
        raise RegistryError(f"{version.name}/{version.version} is neither a pool nor an expert of this project")
    if named.kind == "expert":
        if format is ExportFormat.POOL:
            raise ExportError(f"--format pool: {version.name} is an expert; name a pool, or use peft or vllm")
        if experts:
            raise ExportError(f"--expert: {version.name} is one expert already; leave the option out")
        pool = None
        chosen = {named.name: StoredExpert(reference_to(named.name, version), registered_experts())}
    else:
        address = f"{MODELS}{version.name}/{version.version}"
        pool = read_pool(download_pool(address, scratch), address)
        chosen = _chosen(pool, format, experts)
    base = find_base(named.base, params["base_fingerprint"])
    return Export(version, format, base, base_name or public_name(base), params["base_fingerprint"], pool, chosen)


def _chosen(pool: Pool, format: ExportFormat, names: Sequence[str]) -> dict[str, StoredExpert]:
    """Returns the experts of a pool that are wanted: without names all, for other tools all that are not retired."""
    if missing := [name for name in names if name not in pool.names]:
        raise ExportError(f"--expert: no expert {missing[0]!r} in the pool; there are: {', '.join(pool.names)}")
    retired = () if format is ExportFormat.POOL else pool.retired
    wanted = [name for name in pool.names if (name in names if names else name not in retired)]
    entries = {name: entry for name in wanted if isinstance(entry := pool.experts.entries[name], StoredExpert)}
    if format is not ExportFormat.POOL and (own := [n for n, e in entries.items() if e.reference.version is None]):
        raise RegistryError(
            f"expert {own[0]!r} has no version of its own: an earlier release kept it in the pool; run the pool's `pointsman "
            "learn` again, which registers it, or use --format pool"
        )
    if not entries:
        raise ExportError("the pool has no expert that is not retired; name one with --expert")
    return entries


def model_id(reference: ExpertReference) -> str:
    """Returns the name of an expert's version on a server."""
    return f"{reference.name}-v{reference.version}"


def vllm_rank(name: str, rank: int, scaling: float) -> int:
    """Returns the least rank of vLLM's that holds an adapter, and at which alpha / rank is the same scaling to the last bit."""
    fitting = [r for r in VLLM_RANKS if r >= rank and scaling * r / r == scaling]
    if not fitting:
        raise ExportError(
            f"expert {name!r} has rank {rank}; vLLM serves at most {VLLM_RANKS[-1]}: export it with --format peft"
        )
    return fitting[0]
