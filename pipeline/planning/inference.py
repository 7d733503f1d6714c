"""Memory of inference beyond the frozen weights: base prompts, image embeddings, answers with a KV cache.

Without gradients only the cache is kept between layers; a pass peaks inside its largest layer. Symbols as in
`activations`: n = rows x padded tokens, T padded tokens of a row, D width, Q = heads x head width, K = key-value heads x head
width, H heads, I width of the MLP, L layers, V vocabulary, b bytes of an activation; N new tokens of a row, F image features.
"""

from dataclasses import dataclass

from pipeline.planning.activations import FLOAT, Kernel, Pass, vision_bytes
from pipeline.planning.architecture import Architecture, Decoder


@dataclass(frozen=True)
class Batch:
    """A batch of prompts."""

    rows: int
    tokens: int
    """Tokens of every row, padding included."""
    new: int = 0
    """Tokens of every answer; 0 where none are generated."""
    tiles: int = 0
    """Tiles of all rows."""
    cached_vision: bool = False
    """Whether rows hold image embeddings instead of tiles."""
    kernel: Kernel = "masked"
    bytes: int = 2
    routed: bool = False
    """Whether a pool is attached: Linears then compute an expert's product, too."""
    rank: int = 0
    """Rank of the experts."""

    @property
    def total(self) -> int:
        """Tokens of all rows: n."""
        return self.rows * self.tokens


def inference_moments(architecture: Architecture, batch: Batch) -> dict[str, dict[str, int]]:
    """Returns bytes by moment and part: vision tower, prefill of prompts, decoding of answers (if any)."""
    decoder, tower = architecture.decoder, architecture.tower
    image = batch.tiles * architecture.tile_tokens * decoder.width * batch.bytes if tower else 0
    pixels = FLOAT * batch.tiles * tower.pixels if tower and not batch.cached_vision else 0
    inputs = {"batch": pixels + 24 * batch.total, "image features": image}
    moments = {}
    if tower and batch.tiles and not batch.cached_vision:
        seeing = Pass(batch.rows, batch.tokens, 0, batch.tiles, 0, batch.kernel, bytes=batch.bytes)
        moments["vision tower"] = inputs | {"vision tower's activations": vision_bytes(tower, seeing)}
    moments["prompts"] = inputs | {
        "KV cache": cache_bytes(decoder, batch, batch.total) if batch.new else 0,
        "activations": reading_bytes(decoder, batch),
    }
    if batch.new:
        all_tokens = batch.total + batch.rows * batch.new
        moments["answers"] = inputs | {
            "KV cache": cache_bytes(decoder, batch, all_tokens),
            "KV cache, one layer's copy": cache_bytes(decoder, batch, all_tokens) // decoder.layers // 2,
            "logits": answer_bytes(decoder, batch),
        }
    return moments


def cache_bytes(decoder: Decoder, batch: Batch, tokens: int) -> int:
    """Returns the bytes of keys and values: 2 b L K per token."""
    return 2 * batch.bytes * decoder.layers * decoder.key_value_heads * decoder.head_width * tokens


def reading_bytes(decoder: Decoder, batch: Batch) -> int:
    """Returns the peak of a pass over prompts: the residual, and the larger of a layer's halves.

    residual    4 b n D: embeddings, which the caller holds; residual stream; input of the half and its normalised form
    rotary      2 b T x head width: cosines and sines
    mask        n T where rows are padded, b n T with eager attention
    MLP         3 b n I: activated gate, up, their product; with a pool a fourth, the expert's product beside up
    attention   b n (3 Q + 2 K): query and rotated query, output, key and value
    masked      b n (2 Q + T) more: keys and values repeated for every head, the mask in numbers
    eager       2 b n Q + 8 n H T more: keys and values repeated; scores before and after the softmax
    experts     b n r: the low product of one Linear
    """
    n, b = batch.total, batch.bytes
    heads, key_values = (count * decoder.head_width for count in (decoder.heads, decoder.key_value_heads))
    residual = 4 * b * n * decoder.width + 2 * b * batch.tokens * decoder.head_width
    mlp = b * n * decoder.inner_width * (4 if batch.routed else 3)
    attention = b * n * (3 * heads + 2 * key_values)
    match batch.kernel:
        case "masked":
            residual += n * batch.tokens
            attention += b * n * (2 * heads + batch.tokens)
        case "eager":
            residual += b * n * batch.tokens
            attention += 2 * b * n * heads + 2 * FLOAT * n * decoder.heads * batch.tokens
        case "flash":
            pass
    return residual + max(mlp, attention) + b * n * batch.rank


def answer_bytes(decoder: Decoder, batch: Batch) -> int:
    """Returns the bytes for choosing a token: rows x V x (b + 4), logits and their copy in float32."""
    return batch.rows * decoder.vocabulary * (batch.bytes + FLOAT)


def worst_batch_shapes(longest: int, *, rows: int, tokens: int) -> list[tuple[int, int]]:
    """Returns (rows, tokens per row) of the batches that may need most memory: the longest prompts, and the most prompts.

    With equal numbers of tokens, long rows need larger masks, and many rows more new tokens.
    """
    few = min(rows, max(1, tokens // longest))
    each = min(longest, max(1, tokens // rows))
    return [(few, longest), (min(rows, max(1, tokens // each)), each)]
