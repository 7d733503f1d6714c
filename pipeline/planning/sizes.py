"""Sizes of experts, pools and checkpoints on disk."""

from dataclasses import dataclass

from pipeline.planning.architecture import Architecture
from pipeline.routing.features import feature_width
from pipeline.routing.layer_classifiers import WIDTH

FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk."""

    adapter: int
    vectors: int
    statistics: int
    null: int
    """The null expert: the moments of its components' prompts, and those of base prompts at the Linears."""
    checkpoint: int
    """The training checkpoint; only the last one is kept."""
    row_features: int
    """Cached image embeddings of one row; 0 without cache."""

    @property
    def expert(self) -> int:
        """One expert: adapter, routing vectors, statistics."""
        return self.adapter + self.vectors + self.statistics

    def pool(self, experts: int) -> int:
        """Returns the bytes of a pool with its experts; experts are stored once, however many pools refer to them."""
        return experts * self.expert + self.null


def sizes(
    architecture: Architecture,
    *,
    rank: int,
    wanted_width: int | None,
    null_components: int,
    adapter_bytes: int,
    feature_bytes: int,
    tiles: int,
) -> Sizes:
    """Returns the sizes of one expert and its by-products.

    adapter      a P, in its training precision
    vectors      4 D for each adapted Linear
    statistics   8 F + 2 F (F + 1) of F features of the prompts, and of 64 at each of the four inputs of all layers
    null         8 F + 2 F (F + 1) for every component, and of 64 at the same inputs
    checkpoint   the adapter's weights and AdamW's moments, in float32: 12 P
    """
    parameters = architecture.adapter_parameters(rank)
    decoder = architecture.decoder
    features = feature_width(decoder.width, wanted_width)
    observed = 4 * decoder.layers * _moments(min(WIDTH, decoder.width))
    return Sizes(
        adapter=adapter_bytes * parameters,
        vectors=FLOAT * architecture.vector_parameters,
        statistics=_moments(features) + observed,
        null=null_components * _moments(features) + observed,
        checkpoint=3 * FLOAT * parameters,
        row_features=tiles * architecture.tile_tokens * decoder.width * feature_bytes,
    )


def _moments(width: int) -> int:
    """Returns the bytes of a mean in float64 and half a symmetric matrix in float32."""
    return DOUBLE * width + FLOAT * width * (width + 1) // 2
