"""What the prompt router of a large pool is solved from, kept in the user's cache: opening it then reads no expert.

One file for each set of experts, named by a digest of what their folders hold (`Contents.digest`), whatever their order:
means, counts and thresholds of all, their scatters in few features (`coarse`), and their sums (`pooled`). A set that is not
there is made of the nearest one that is, by adding and taking away the experts in which they differ; only those are read. A
missing, outdated or damaged file is made anew. Shapes: E experts, F features.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.files import atomic_file, user_cache
from pipeline.routing import coarse
from pipeline.routing.expert import Expert
from pipeline.routing.features import FEATURE_RULE
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.serialization import read_tensors, write_tensors
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.store import ExpertReference, StoredExpert

SMALLEST = 64
"""Experts from which on a pool's sums are kept; those of fewer are summed in a moment."""
KEPT = 4
"""Files that are kept, those used last: 375 MB each at 10,000 experts and F = 512."""
VERSION = f"1.{FEATURE_RULE}"
"""Version of what the files hold."""

NOTHING = torch.zeros(0)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolStatistics:
    """What the prompt router of a pool is made of."""

    experts: Sequence[PromptStatistics]
    """In the pool's order."""
    pooled: PooledStatistics | None = None
    """Their sums; None where few are not worth keeping."""
    few: Sequence[PromptStatistics] | None = None
    """The experts' in few features, if there are sums."""


def pool_statistics(entries: Sequence[Expert | StoredExpert]) -> PoolStatistics:
    """Returns the statistics of a pool's experts. Raises ExpertError where one that has to be read is missing or damaged."""
    stored = {
        entry.reference.content: entry
        for entry in entries
        if isinstance(entry, StoredExpert) and entry.reference.content is not None
    }
    if len(stored) < max(
        SMALLEST, len(entries)
    ):  # some that is in memory alone, or of an early release, has no such name
        return PoolStatistics([e.expert.statistics if isinstance(e, StoredExpert) else e.statistics for e in entries])
    file = _folder() / f"{_digest(stored)}.safetensors"
    sums = _read(file)
    if sums is None:
        sums = _made(stored)
        _write(file, sums, [entry.reference for entry in stored.values()])
    small, halves = zip(*(sums.members[content] for content in stored), strict=True)
    experts = [replace(s, scatter=partial(_scatter, e)) for s, e in zip(small, stored.values(), strict=True)]
    return PoolStatistics(experts, sums.pooled, coarse.unpacked(small, torch.stack(halves)))


Member = tuple[PromptStatistics, Tensor]
"""An expert's statistics, whose scatter may not be there, and the upper half of that in few features."""


@dataclass(frozen=True)
class _Sums:
    """What a file holds."""

    members: Mapping[str, Member]
    """By the digest of what an expert's folder holds."""
    pooled: PooledStatistics


def _member(statistics: PromptStatistics) -> Member:
    s = statistics
    small = PromptStatistics(s.count, s.mean_F, NOTHING, s.threshold, s.independent, s.with_image)
    return small, coarse.packed([coarse.coarse_statistics(statistics)])[0]


def _scatter(entry: StoredExpert) -> Tensor:
    return entry.read().statistics.scatter_FF


def _folder() -> Path:
    return user_cache("routers")


def _digest(contents: Mapping[str, StoredExpert]) -> str:
    return hashlib.sha256("\n".join([VERSION, *sorted(contents)]).encode()).hexdigest()


def _made(stored: Mapping[str, StoredExpert]) -> _Sums:
    """Sums the statistics of experts, from the nearest set that is kept; reads those in which they differ."""
    known, gone = _nearest(stored)
    members, pooled = ({}, None) if known is None else (dict(known.members), known.pooled)
    for content, entry in stored.items():
        if content not in members:
            statistics = entry.read().statistics
            members[content] = _member(statistics)
            pooled = PooledStatistics.of([statistics]) if pooled is None else pooled + statistics
    for entry in gone:
        assert pooled is not None
        pooled -= entry.read().statistics
    assert pooled is not None, "there are experts"
    return _Sums({content: members[content] for content in stored}, pooled)


def _nearest(stored: Mapping[str, StoredExpert]) -> tuple[_Sums | None, list[StoredExpert]]:
    """Returns the kept set that differs least from these experts, and its experts that are not among them.

    None where all differ in as many experts as there are; those that a store has no more cannot be taken away.
    """
    store = next(iter(stored.values())).store
    best, least, best_gone = None, len(stored), list[StoredExpert]()
    for file in _folder().glob("*.safetensors"):
        names = _names(file)
        gone = [StoredExpert(reference, store) for content, reference in names.items() if content not in stored]
        differences = len(stored) - (len(names) - len(gone)) + len(gone)
        if differences < least and all(store.has(entry.reference) for entry in gone):
            best, least, best_gone = file, differences, gone
    return (None if best is None else _read(best)), best_gone


def _names(file: Path) -> dict[str, ExpertReference]:
    """Returns the experts of a file; none where it is damaged or outdated."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return _references(metadata) if metadata.get("version") == VERSION else {}
    except (OSError, SafetensorError, ValueError, KeyError):
        return {}


def _references(metadata: Mapping[str, str]) -> dict[str, ExpertReference]:
    rows = json.loads(metadata["members"])
    return {content: ExpertReference(name=name, digest=digest, content=content) for content, name, digest in rows}


def _read(file: Path) -> _Sums | None:
    """Reads a file and notes that it was used; None where it is missing, outdated or damaged."""
    try:
        tensors, metadata = read_tensors(file)
        if metadata["version"] != VERSION or metadata["sha256"] != _checksum(tensors):
            raise ValueError("it does not hold what it says")
        names = _references(metadata)
        pooled = PooledStatistics(
            int(tensors["pooled.count"]), *(tensors[f"pooled.{part}"] for part in ("mean", "squares", "scatter"))
        )
        columns = (tensors[name].tolist() for name in ("counts", "thresholds", "images", "with_image"))
        rows = zip(names, tensors["means"], *columns, tensors["few"], strict=True)
        members = {
            name: (PromptStatistics(count, mean_F, NOTHING, threshold, images, _known(with_image)), half)
            for name, mean_F, count, threshold, images, with_image, half in rows
        }
        os.utime(file)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        _logger.info("%s is made anew: %s", file, error)
        return None
    return _Sums(members, pooled)


def _known(with_image: int) -> int | None:
    return None if with_image < 0 else with_image


def _write(file: Path, sums: _Sums, references: Sequence[ExpertReference]) -> None:
    """Writes a file, and removes those that were not used for longest; a cache that cannot be written is done without."""
    members, halves = zip(*sums.members.values(), strict=True)
    pooled = sums.pooled
    names = [[reference.content, reference.name, reference.digest] for reference in references]
    tensors = {
        "means": torch.stack([s.mean_F for s in members]),
        "counts": torch.tensor([s.count for s in members]),
        "images": torch.tensor([s.independent for s in members]),
        "with_image": torch.tensor([-1 if s.with_image is None else s.with_image for s in members]),
        "thresholds": torch.tensor([s.threshold for s in members], dtype=torch.float64),
        "few": torch.stack(halves),
        "pooled.count": torch.tensor(pooled.count),
        "pooled.mean": pooled.mean_F.contiguous(),
        "pooled.squares": pooled.squares_F.contiguous(),
        "pooled.scatter": pooled.scatter_FF.contiguous(),
    }
    metadata = {"version": VERSION, "members": json.dumps(names), "sha256": _checksum(tensors)}
    try:
        with atomic_file(file) as staging:
            write_tensors(staging, tensors, metadata)
        by_age = sorted(file.parent.glob("*.safetensors"), key=lambda kept: kept.stat().st_mtime)
        for old in by_age[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _logger.info("%s is not kept: %s", file, error)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
