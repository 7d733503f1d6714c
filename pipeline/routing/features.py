"""What the prompt router looks at: a prompt as one vector, taken before the language model runs.

The vector of a prompt is 5 D wide: of its text [mean of the embeddings, how neighbours follow one another], of its images
[mean of the projected tokens, their standard deviation, how neighbours go together]. It costs no extra pass, since the
language model needs those inputs anyway. Means and deviation have length 1, or 0 where the prompt has nothing of their kind:
their own lengths say little and differ by base (33, 40 and 0.4 in the base that ships here), so that text would drown where
one projection mixes all. Lengths are those of one prompt, not of a data set: the rule is the same for every expert ever
trained, and their statistics can be summed.

Neighbours: a mean does not know the order of words, nor whether a picture is striped or dotted. Of unit vectors u_t

    text    mean over t of u_t * roll(u_t+1, 1)        images    mean over t of v_t * v_t+1,  v_t centred on the image's mean

at length `ORDER` and `TEXTURE`. The roll by one place makes the product differ by which of the two comes first; an image
between words is skipped. Without these two, tasks that ask with the same words in another order reach the right expert as by
a coin (0.57 of their prompts, 1.00 with it, beside a hundred tasks), and pictures of one colour and another pattern are told
apart in 0.93 instead of 0.97 of the cases.

The token on either side of an image (or of one of its tiles) is no text: it delimits the image in most families, so it
would say what the image parts say already, and a question about a picture would differ from the same one without.

Text and images keep their places apart in a projection too, the text's first: a task that never saw an image says nothing
about images, and what it says about text can still be read (`unseen`). Shapes: B rows, T tokens, D the language model's
width, S = 5 D source features, F features.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

FEATURE_RULE = 3
"""Version of the rule by which a prompt becomes features; statistics of different rules cannot be summed."""

TEXT_PARTS, IMAGE_PARTS = 2, 3
"""Parts of D features each."""

ORDER, TEXTURE = 0.2, 0.5
"""Lengths of what is known of neighbours, where a mean has length 1."""

WIDEST = 512
"""Up to this many features are taken as they are; wider bases are projected, or an expert's second moments (F x F) would
outweigh its LoRA."""


def prompt_features(embeds_BTD: Tensor, image_BT: Tensor, text_BT: Tensor) -> Tensor:
    """Returns the features (B, 5 D), float32.

    `image_BT` and `text_BT` are masks (true or 1) of the projected image tokens and of the prompt's text tokens; a
    text-only prompt has zeros in its image parts.
    """
    image_BT = image_BT.bool()
    text_BT = text_BT.bool() & ~_delimiters(image_BT)
    # One prompt at a time: a prompt of many tiles is hundreds of megabytes in float32, and the more so several of them.
    rows = zip(embeds_BTD, image_BT, text_BT, strict=True)
    return torch.stack([_features(x_TD[image_T].float(), x_TD[text_T].float()) for x_TD, image_T, text_T in rows])


def _features(image_ID: Tensor, text_WD: Tensor) -> Tensor:
    """Returns the features (5 D,) of one prompt, of its image tokens (I, D) and of its words (W, D)."""
    mean_D = image_ID.sum(0) / max(1, len(image_ID))
    deviation_ID = image_ID - mean_D
    std_D = (deviation_ID.square().sum(0) / max(1, len(image_ID))).sqrt()
    least = (1e-3 * mean_D.norm()).clamp(min=1e-12)  # a deviation that is only rounding stays next to nothing
    std_D = std_D / torch.maximum(std_D.norm(), least)
    text_D, order_D, texture_D = text_WD.sum(0), _neighbours(text_WD, roll=1), _neighbours(deviation_ID, least=least)
    mean_D, text_D = (normalize(x_D, dim=-1) for x_D in (mean_D, text_D))
    return torch.cat([text_D, ORDER * order_D, mean_D, std_D, TEXTURE * texture_D])


def _delimiters(image_BT: Tensor) -> Tensor:
    """Returns which tokens stand next to an image token (B, T)."""
    return functional.pad(image_BT[:, 1:], (0, 1)) | functional.pad(image_BT[:, :-1], (1, 0))


def _neighbours(x_KD: Tensor, *, roll: int = 0, least: Tensor | float = 1e-12) -> Tensor:
    """Returns the mean product of unit vectors with the next one, rolled, at length 1 (D,); 0 of fewer than two.

    Vectors shorter than `least` count by their length.
    """
    unit_KD = x_KD / x_KD.norm(dim=-1, keepdim=True).clamp(min=least)
    return normalize((unit_KD[:-1] * unit_KD[1:].roll(roll, -1)).sum(0), dim=-1)


def source_width(width: int) -> int:
    """Returns S, the features of a prompt before any projection, for a language model of `width`."""
    return (TEXT_PARTS + IMAGE_PARTS) * width


def feature_width(width: int, wanted: int | None) -> int:
    """Returns F for a language model of `width`: `wanted`, or else S where that is at most `WIDEST`."""
    return wanted or min(source_width(width), WIDEST)


def text_width(width: int) -> int:
    """Returns how many of `width` features are of text; they come first."""
    return width * TEXT_PARTS // (TEXT_PARTS + IMAGE_PARTS)


def has_image(features_BF: Tensor) -> Tensor:
    """Returns which prompts have an image (B,), bool, by their features, projected or not."""
    return features_BF[:, text_width(features_BF.shape[-1]) :].any(-1)


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
    """Projects vectors (B, S) to (B, `target`), all of S alike."""
    matrix = projection(features_BS.shape[-1], target)
    return features_BS if matrix is None else features_BS @ matrix.to(features_BS.device)


def project_prompts(features_BS: Tensor, target: int) -> Tensor:
    """Projects the features of prompts to (B, `target`), those of text and those of images each to places of their own."""
    if features_BS.shape[-1] == target:
        return features_BS
    text, text_target = text_width(features_BS.shape[-1]), text_width(target)
    parts = project(features_BS[..., :text], text_target), project(features_BS[..., text:], target - text_target)
    return torch.cat(parts, dim=-1)
