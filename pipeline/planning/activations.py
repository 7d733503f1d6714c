"""Activation memory of one forward and backward pass, from a base's widths.

Tensors that autograd saves are counted one by one for transformers' decoder layers with PEFT's LoRA on a frozen base; idea
and notation follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198, section 4). Its 34 s b h + 5 a s^2 b is for full training of GPT-3's layer in 16 bits and does not hold here: frozen
Linears do not save their input, RMSNorm computes in float32, the MLP is gated. `pointsman benchmark plan` measures it.
The router stage takes less than the expert stage: gates save the inputs that a LoRA saves, and vectors are small.

Symbols: n = rows x padded tokens; m = rows x tokens at which logits are computed; T padded tokens per row; D width; Q =
heads x head width; K = key-value heads x head width; H heads; I width of the MLP; L layers; V vocabulary; r rank; b bytes of
an activation, a of an adapter's.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from pipeline.planning.architecture import Architecture, Decoder, Tower

Kernel = Literal["eager", "flash", "masked"]
"""Attention kernel; see `attention_bytes`."""

FLOAT = 4
"""Bytes of float32, in which norms, softmax and loss are computed in any precision."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of one worker."""

    rows: int
    tokens: int
    """Tokens of every row, padding included."""
    answer_tokens: int
    """Tokens of every row at which logits are computed: those whose next token has a label."""
    tiles: int
    """Tiles of all rows in the vision tower; 0 with cached embeddings."""
    rank: int
    kernel: Kernel
    dropout: bool = False
    """Whether adapters have dropout."""
    checkpointing: bool = False
    """Gradient checkpointing, layer by layer."""
    bytes: int = 2
    """Bytes of an activation: 2 in bf16, 4 in fp32."""
    adapter_bytes: int = 2
    """Bytes of an adapter's weight; 4 beside a bf16 base where `training.precision` is fp32."""
    gpu: bool = True
    """Dropout saves a mask of one byte on GPUs, one of the activation's precision on CPUs."""

    @property
    def total(self) -> int:
        """Tokens of all rows: n."""
        return self.rows * self.tokens

    @property
    def learned(self) -> int:
        """Tokens of all rows at which logits are computed: m."""
        return self.rows * self.answer_tokens


@dataclass(frozen=True)
class Activations:
    """Bytes of a pass by use and time."""

    kept: int
    """From forward to backward: all layers' saved tensors, or with checkpointing each layer's input."""
    kept_last: int
    """`kept` while the last layer runs backward: all but the final norm's."""
    kept_first: int
    """`kept` while the first adapted layer runs backward."""
    recomputed: int
    """One layer's saved tensors, recomputed for its backward pass; 0 without checkpointing."""
    logits: int
    """Peak of logits and loss."""
    final_norm: int
    """Gradients while the final norm runs backward."""
    backward: int
    """Gradients of activations while a layer runs backward."""
    vision: int
    """The vision tower while it runs; nothing of it is saved for backward."""


def activations(architecture: Architecture, step: Pass) -> Activations:
    """Returns the bytes of a pass."""
    decoder, tower = architecture.decoder, architecture.tower
    readers = Counter((linear.layer, linear.reads) for linear in architecture.adapted)
    first = min(linear.layer for linear in architecture.adapted)
    layers = {layer: layer_bytes(decoder, step, _reads(readers, layer)) for layer in range(first, decoder.layers)}
    norm = step.total * (FLOAT * decoder.width + FLOAT)
    rotary = 2 * step.bytes * step.tokens * decoder.head_width  # cosines and sines, shared by all rows and layers
    # Below the first adapter nothing needs a gradient, so nothing is saved.
    if step.checkpointing:
        residual = step.total * decoder.width * step.bytes
        kept_first = residual + mask_bytes(step) + rotary
        kept_last = kept_first + (len(layers) - 1) * residual
        # In float32 the input that a layer's first norm saves is the checkpoint itself.
        recomputed = max(layers.values()) - (residual if step.bytes == FLOAT else 0)
    else:
        kept_first = layers[first] - norm + rotary  # its first norm lies below the adapter, too
        kept_last, recomputed = sum(layers.values()) - norm + rotary, 0
    return Activations(
        kept=kept_last + norm,
        kept_last=kept_last,
        kept_first=kept_first,
        recomputed=recomputed,
        logits=logits_bytes(decoder, step),
        final_norm=final_norm_bytes(decoder, step),
        backward=backward_bytes(decoder, step),
        vision=vision_bytes(tower, step) if tower else 0,
    )


def _reads(readers: Counter[tuple[int, str]], layer: int) -> dict[str, int]:
    """Returns the number of adapted Linears per input of a layer."""
    return {reads: count for (of_layer, reads), count in readers.items() if of_layer == layer}


def layer_bytes(decoder: Decoder, step: Pass, readers: dict[str, int]) -> int:
    """Returns the bytes that one decoder layer saves for its backward pass.

    norms       n (4 D + 4) each: the input in float32 and its inverse root mean square
    attention   see `attention_bytes`
    MLP         3 b n I: gate, activated gate, up
    LoRA        a n r for each adapted Linear, and its input: b n D before q, k, v (one for all three), b n D before gate and
                up, b n I before down; that before o is attention's own output. With dropout (or another precision) each
                Linear has its own input, and a mask.

    A frozen Linear saves nothing: its gradient needs the weight only.
    """
    n, b, a = step.total, step.bytes, step.adapter_bytes
    norms = sum(n * FLOAT * width for width in decoder.norm_widths) + n * FLOAT * len(decoder.norm_widths)
    mlp = 3 * b * n * decoder.inner_width
    heads = decoder.heads * decoder.head_width
    widths = {"attention": decoder.width, "heads": heads, "mlp": decoder.width, "inner": decoder.inner_width}
    lora = 0
    for reads, count in readers.items():
        lora += count * a * n * step.rank
        if step.dropout:
            lora += count * n * widths[reads] * (a + (1 if step.gpu else a))
        elif a != b:
            lora += count * n * widths[reads] * a
        elif reads != "heads" or step.kernel == "eager":
            lora += n * widths[reads] * b
    return norms + attention_bytes(decoder, step) + mlp + lora


def attention_bytes(decoder: Decoder, step: Pass) -> int:
    """Returns the bytes that attention saves, without the inputs of its Linears.

    flash    b n (2 Q + 2 K) + 4 n H: query, key, value, output and the softmax's normaliser (arXiv 2205.14135, algorithm
             2). FlashAttention-2, or PyTorch's flash kernel where no row is padded; its kernel for CPUs saves the same.
    masked   b n (4 Q + T) + 4 n H: where rows are padded, keys and values are repeated for every head, and each layer
             makes its own float mask. On GPUs that is PyTorch's memory-efficient kernel.
    eager    b n 3 Q + n H T (4 + b): query, repeated key and value; the attention matrix in float32 and, unless b is 4,
             once more in b.
    """
    n, b = step.total, step.bytes
    heads, key_values = (count * decoder.head_width for count in (decoder.heads, decoder.key_value_heads))
    match step.kernel:
        case "flash":
            return b * n * (2 * heads + 2 * key_values) + FLOAT * n * decoder.heads
        case "masked":
            return b * n * (4 * heads + step.tokens) + FLOAT * n * decoder.heads
        case "eager":
            return b * n * 3 * heads + n * decoder.heads * step.tokens * (FLOAT + (b if b != FLOAT else 0))


def mask_bytes(step: Pass) -> int:
    """Returns the bytes of the mask in checkpoints, for all layers: n T; b bytes each with eager attention, 1 where padded."""
    return step.total * step.tokens * {"eager": step.bytes, "flash": 0, "masked": 1}[step.kernel]


def logits_bytes(decoder: Decoder, step: Pass) -> int:
    """Returns the peak of logits and loss: 12 m V, in the backward pass.

    forward     b m V of logits, 4 m V of them in float32 (unless b is 4), 4 m V of log-softmax: 10 m V, 8 where b is 4
    backward    4 m V each: the log-softmax that was kept, the loss's gradient by it, and the gradient by the logits
    """
    return 3 * FLOAT * step.learned * decoder.vocabulary


def final_norm_bytes(decoder: Decoder, step: Pass) -> int:
    """Returns the bytes of gradients while the final norm runs backward: 20 n D, five float32 tensors of n D."""
    return 5 * FLOAT * step.total * decoder.width


def backward_bytes(decoder: Decoder, step: Pass) -> int:
    """Returns the bytes of gradients of activations while the last layer runs backward: the larger of MLP and attention.

    MLP         b n (2 I + D): two gradients by the inner product and one by the residual
    attention   eager only: 8 n H T for the gradients before and after the softmax, less the MLP's tensors, freed by then
    """
    n, b = step.total, step.bytes
    mlp = b * n * (2 * decoder.inner_width + decoder.width)
    if step.kernel != "eager":
        return mlp
    matrices = 2 * FLOAT * n * decoder.heads * step.tokens
    return max(mlp, matrices - 4 * b * n * decoder.inner_width)


def vision_bytes(tower: Tower, step: Pass) -> int:
    """Returns the bytes of the vision tower while it runs on N tiles.

    With P positions per tile, width D_v and MLP I_v: b N P (2 I_v + 5 D_v) in a layer's MLP, beside the tiles cast to b unless
    that is 4. Eager attention's matrix, b N H_v P^2, is still in memory then.
    """
    positions = step.tiles * tower.positions
    layer = positions * (2 * tower.inner_width + 5 * tower.width)
    matrix = positions * tower.positions * tower.heads if step.kernel == "eager" else 0
    cast = step.tiles * tower.pixels if step.bytes != FLOAT else 0
    return step.bytes * (layer + matrix + cast)
