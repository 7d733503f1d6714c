"""Operations of a step, and its seconds on a GPU.

A multiplication and an addition count as two operations. Forward, backward and attention are counted as by Kaplan et al.
(arXiv 2001.08361, section 2.1) and in PaLM's definition of utilisation (arXiv 2204.02311, appendix B), without the parts
that a frozen base skips.

Symbols: M parameters of the decoder layers' Linears, P of the adapter, V vocabulary, D width, Q heads x head width, T tokens, A
those at which logits are computed.
"""

from dataclasses import dataclass

from pipeline.planning.activations import Kernel
from pipeline.planning.architecture import Architecture
from pipeline.planning.gpus import Gpu

LINK_SHARE = 0.6
"""Share of a link's speed that gathering weights reaches; an assumption."""


@dataclass(frozen=True)
class Operations:
    """Operations of one row by purpose."""

    forward: float
    """Language model and head."""
    backward: float
    """Through activations; the frozen base needs no gradients of weights."""
    adapter: float
    """The LoRA, all of it."""
    recomputed: float
    """Forward once more, with gradient checkpointing."""
    vision: float
    """Vision tower and projector, forward only."""

    @property
    def total(self) -> float:
        """All of a row."""
        return self.forward + self.backward + self.adapter + self.recomputed + self.vision


def operations(
    architecture: Architecture,
    *,
    tokens: int,
    answer_tokens: int,
    tiles: int,
    rank: int,
    kernel: Kernel,
    checkpointing: bool,
) -> Operations:
    """Returns the operations of one training row of `tokens` T, `answer_tokens` A and `tiles`.

    forward      2 T M + 2 A D V + attention; attention is 4 T^2 Q per layer, half of it where the kernel skips what the
                 causal mask hides (flash)
    backward     2 T M + 2 A D V + attention twice, 2.5 times where flash computes its matrix again (arXiv 2307.08691,
                 section 4.1)
    adapter      6 T P: forward, gradients of activations, gradients of weights
    recomputed   2 T M + attention, and 2 T P of the adapter
    vision       see `vision_operations`

    So training behind a frozen base takes 4 T M where full training takes 6 T M.
    """
    decoder = architecture.decoder
    adapter = architecture.adapter_parameters(rank)
    attention = 4 * tokens**2 * decoder.heads * decoder.head_width * decoder.layers
    flash = kernel == "flash"
    attention = attention // 2 if flash else attention
    layers = 2 * tokens * decoder.matrices
    head = 2 * answer_tokens * decoder.width * decoder.vocabulary
    return Operations(
        forward=layers + head + attention,
        backward=layers + head + attention * (2.5 if flash else 2),
        adapter=6 * tokens * adapter,
        recomputed=layers + attention + 2 * tokens * adapter if checkpointing else 0,
        vision=vision_operations(architecture, tiles),
    )


def vision_operations(architecture: Architecture, tiles: int) -> float:
    """Returns the operations of a forward pass over tiles: 2 P M_v + 4 P^2 D_v per layer and 2 T_v M_p in the projector.

    P positions, D_v width, M_v and M_p parameters of tower and projector, T_v tokens of a tile.
    """
    tower = architecture.tower
    if tower is None:
        return 0
    attention = 4 * tower.positions**2 * tower.width * tower.layers
    projector = 2 * architecture.tile_tokens * tower.projector_matrices
    return tiles * (2 * tower.positions * tower.matrices + attention + projector)


def gathering_seconds(weights: int, workers: int, gpu: Gpu, *, passes: int) -> float:
    """Returns the seconds for which ZeRO-3 gathers w B bytes of weights per micro-batch, `passes` times: (N - 1) / N
    of them come from others. DeepSpeed fetches ahead, so computing and gathering overlap.
    """
    return passes * weights * (workers - 1) / workers / (gpu.link * LINK_SHARE)


def answering_seconds(
    architecture: Architecture,
    *,
    prompts: int,
    tokens: int,
    tiles: int,
    new: int,
    batch: int,
    weights: int,
    gpu: Gpu,
    use: float,
) -> float:
    """Returns the seconds that one GPU takes to answer prompts, `batch` at a time.

    Prefill is bound by operations, 2 T M + vision; each of `new` tokens is bound by reading all weights once per batch.
    """
    operations_per_prompt = 2 * tokens * architecture.decoder.matrices + vision_operations(architecture, tiles)
    return prompts * operations_per_prompt / (gpu.operations * use) + prompts / batch * new * weights / gpu.bandwidth
