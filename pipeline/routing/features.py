"""What the prompt router looks at: a prompt as one vector, taken before the language model runs.

The vector of a prompt is [mean of the projected image tokens, their standard deviation, mean of the text embeddings],
3 D wide; it costs no extra pass, since the language model needs those inputs anyway. Each of the three has length 1, or 0
where the prompt has nothing of its kind. Their own lengths say little and differ by base: 33, 40 and 0.4 in the base that
ships here, so that text would drown where one projection mixes all three. Lengths are those of one prompt, not of a data
set: the rule is the same for every expert ever trained, and their statistics can be summed. Shapes: B rows, T tokens, D the
language model's width, F features.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

FEATURE_RULE = 2
"""Version of the rule by which a prompt becomes features; statistics of different rules cannot be summed."""

WIDEST = 512
"""Up to this many features are taken as they are; wider bases are projected, or an expert's second moments (F x F) would
outweigh its LoRA."""


def prompt_features(embeds_BTD: Tensor, image_BT: Tensor, text_BT: Tensor) -> Tensor:
    """Returns the features (B, 3 D), float32.

    `image_BT` and `text_BT` are masks (true or 1) of the projected image tokens and of the prompt's text tokens; a
    text-only prompt has zeros in its image part, and the whole of a projection for its text.
    """
    embeds_BTD = embeds_BTD.float()
    image_BT1, text_BT1 = image_BT.unsqueeze(-1).float(), text_BT.unsqueeze(-1).float()
    images_B1 = image_BT1.sum(1).clamp(min=1)
    mean_BD = (embeds_BTD * image_BT1).sum(1) / images_B1
    deviation_BTD = (embeds_BTD - mean_BD.unsqueeze(1)) * image_BT1
    std_BD = (deviation_BTD.square().sum(1) / images_B1).sqrt()
    text_BD = (embeds_BTD * text_BT1).sum(1) / text_BT1.sum(1).clamp(min=1)
    # A deviation that is only rounding stays next to nothing.
    size_B1 = torch.maximum(std_BD.norm(dim=-1, keepdim=True), 1e-3 * mean_BD.norm(dim=-1, keepdim=True))
    return torch.cat([normalize(mean_BD), std_BD / size_B1.clamp(min=1e-12), normalize(text_BD)], dim=-1)


def feature_width(width: int, wanted: int | None) -> int:
    """Returns F for a language model of `width`: `wanted`, or else 3 D where that is at most `WIDEST`."""
    return wanted or min(3 * width, WIDEST)


@lru_cache(maxsize=16)
def projection(source: int, target: int) -> Tensor | None:
    """Returns the fixed random projection (source, target) that all experts share, or None where none is needed.

    Gaussian with variance 1 / target, from a constant seed: it must be the same for every expert ever trained, or their
    statistics could not be summed.
    """
    if source == target:
        return None
    return torch.randn(source, target, generator=torch.Generator().manual_seed(0)) / target**0.5


def project(features_BS: Tensor, target: int) -> Tensor:
    """Projects features (B, 3 D) to (B, `target`)."""
    matrix = projection(features_BS.shape[-1], target)
    return features_BS if matrix is None else features_BS @ matrix.to(features_BS.device)
