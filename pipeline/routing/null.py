"""The null class: base prompts, which belong to the base, as several Gaussians.

One would be too coarse: it covers whatever lies between the base's abilities, and inside each of them it loses to a task
that resembles it. Shapes: N prompts, F features, K components.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.routing.serialization import (
    VERSIONS,
    check_versions,
    layer_statistics_of,
    layer_tensors,
    read_tensors,
    statistics_of,
    statistics_tensors,
    write_tensors,
)
from pipeline.routing.statistics import PromptStatistics

Components = tuple[PromptStatistics, ...]
LayerStatistics = dict[str, PromptStatistics]
"""What Linears see of base prompts, by module path."""

ROUNDS = 50
"""Most rounds of k-means."""


def components(features_NF: Tensor, count: int, ids_N2: Tensor | None = None) -> tuple[PromptStatistics, ...]:
    """Splits base prompts (N, F) into at most `count` components and takes the statistics of each; for `ids_N2` see there.

    k-means on standardised features, started by k-means++ (Arthur and Vassilvitskii, SODA 2007) from a constant seed: the
    same prompts, in whatever order, make the same components.
    """
    x_NF = features_NF.double()
    order_N = x_NF.sum(-1).argsort(stable=True)
    x_NF = x_NF[order_N]
    variance_F = x_NF.var(0, correction=0)
    z_NF = (x_NF - x_NF.mean(0)) / (variance_F + 1e-6 * variance_F.mean() + 1e-12).sqrt()
    random = torch.Generator().manual_seed(0)
    centres_KF = z_NF[torch.randint(len(z_NF), (1,), generator=random)]
    while len(centres_KF) < count:
        nearest_N = torch.cdist(z_NF, centres_KF).amin(1).square()
        if nearest_N.max() < 1e-9:
            break  # no further distinct prompt
        centres_KF = torch.cat([centres_KF, z_NF[torch.multinomial(nearest_N, 1, generator=random)]])
    cluster_N = torch.cdist(z_NF, centres_KF).argmin(1)
    for _ in range(ROUNDS):
        centres_KF = torch.stack([z_NF[cluster_N == k].mean(0) for k in cluster_N.unique().tolist()])
        before_N, cluster_N = cluster_N, torch.cdist(z_NF, centres_KF).argmin(1)
        if cluster_N.equal(before_N):
            break
    ids_N2 = None if ids_N2 is None else ids_N2[order_N]
    return tuple(
        PromptStatistics.of(x_NF[cluster_N == k], None if ids_N2 is None else ids_N2[cluster_N == k])
        for k in cluster_N.unique().tolist()
    )


def write_null(file: Path, null: Sequence[PromptStatistics], layer_statistics: Mapping[str, PromptStatistics]) -> None:
    """Writes the components and what the Linears see of base prompts as a safetensors file."""
    metadata = {name: str(version) for name, version in VERSIONS.items()}
    write_tensors(file, _null_tensors(null, layer_statistics), metadata=metadata)


def null_digest(null: Sequence[PromptStatistics], layer_statistics: Mapping[str, PromptStatistics]) -> str:
    """Returns a digest of what `write_null` writes, 64 hex digits (of its tensors: the order of a file's metadata varies)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_null_tensors(null, layer_statistics).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _null_tensors(
    null: Sequence[PromptStatistics], layer_statistics: Mapping[str, PromptStatistics]
) -> dict[str, Tensor]:
    tensors = layer_tensors(layer_statistics)
    for number, component in enumerate(null):
        tensors |= statistics_tensors(component, f"null.{number}")
    return tensors


def read_null(file: Path, digest: str | None = None) -> tuple[Components, LayerStatistics]:
    """Reads what `write_null` wrote.

    Raises ExpertError where another version did, ValueError where it is not what `digest` names.
    """
    tensors, metadata = read_tensors(file)
    check_versions(file, metadata)
    count = sum(key.startswith("null.") and key.endswith(".mean") for key in tensors)
    null = tuple(statistics_of(tensors, f"null.{number}") for number in range(count))
    layer_statistics = layer_statistics_of(tensors)
    if digest not in (None, null_digest(null, layer_statistics)):
        raise ValueError(f"it does not hold the statistics with digest {digest}")
    return null, layer_statistics
