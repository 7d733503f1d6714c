"""Prompts of a kind that a task never showed: with an image, where it was learned in text alone, or without, where it always
had one.

Such a task says nothing about that: its features of images never varied, and whatever else they are lies infinitely far away.
So its likelihood of the prompt is taken of the text alone (the marginal of its t distribution), and the image is left to the
distribution that all share, that of the base prompts:

    score_c(x) = log p_c(x_text) + log (1 / K) sum_k p_k(x_image)        k: the null expert's K components

A picture that comes with a text task's question so can reach that task's expert. It does only where the text is likelier to be
the task's than any base prompt's: the image is the same in both. Without a null expert nothing is known of images, and nothing
is done. Shapes: B prompts, F features, C classes (experts, then the K components), L of them listed for each prompt.
"""

import math

import torch
from torch import Tensor

from pipeline.routing.features import has_image, text_width
from pipeline.routing.gaussian import Gaussians


class UnseenImages:
    """The experts of a pool that never saw an image, or never a prompt without one."""

    def __init__(self, gaussians: Gaussians, experts: int) -> None:
        """`experts`: how many of the classes are experts; the others are the null expert's components, one at least."""
        self._gaussians, self._experts, self._width = gaussians, experts, gaussians.classes[0].width
        self._text = text_width(self._width)

    @classmethod
    def among(cls, gaussians: Gaussians, experts: int, x_BF: Tensor) -> "UnseenImages | None":
        """Returns them where any of these prompts are of a kind that one of them never saw; None without a null expert."""
        if experts == len(gaussians.classes):
            return None
        unseen = cls(gaussians, experts)
        return unseen if unseen.by(x_BF).any() else None

    def by(self, x_BF: Tensor) -> Tensor:
        """Returns which experts never saw prompts like these, as far as images go (B, E)."""
        gaussians, image_B1 = self._gaussians, has_image(x_BF).unsqueeze(-1)
        return torch.where(image_B1, gaussians.never_with_image_C, gaussians.always_with_image_C)[:, : self._experts]

    def distances(self, x_BF: Tensor, distance_BC: Tensor) -> Tensor:
        """Returns the distances (B, C) to select by: an unseen expert's is that of the text and of the nearest base image."""
        text_BC = self._gaussians.text_index.distances(x_BF[:, : self._text])
        image_B1 = (distance_BC - text_BC)[:, self._experts :].amin(-1, keepdim=True)
        by_text_BE = (text_BC + image_B1)[:, : self._experts]
        own_BE, null_BK = distance_BC.tensor_split([self._experts], dim=-1)
        return torch.cat([by_text_BE.where(self.by(x_BF), own_BE), null_BK], dim=-1)

    def scores(self, x_BF: Tensor, listed_BL: Tensor, score_BL: Tensor) -> Tensor:
        """Returns the scores of listed experts (B, L) with those of unseen ones by text, -inf where base text is likelier."""
        unseen_BL = self.by(x_BF).gather(-1, listed_BL)
        rows_N = unseen_BL.any(-1).nonzero()[:, 0]
        x_NF, score_BL = x_BF[rows_N], score_BL.clone()
        components = len(self._gaussians.classes) - self._experts
        null_NK = torch.arange(components).expand(len(rows_N), -1) + self._experts
        text, image = (0, self._text), (self._text, self._width)
        text_NL = self._gaussians.scores(x_NF, listed_BL[rows_N], part=text)
        base_N1 = self._gaussians.scores(x_NF, null_NK, part=text).logsumexp(-1, keepdim=True)
        likelier_NL, by_text_NL = text_NL > base_N1, torch.full_like(text_NL, -torch.inf)
        for_N = (likelier_NL & unseen_BL[rows_N]).any(-1)
        if for_N.any():  # the images of few prompts are looked at: most that an expert has not seen are the base's
            image_N1 = self._gaussians.scores(x_NF[for_N], null_NK[for_N], part=image).logsumexp(-1, keepdim=True)
            by_text_NL[for_N] = text_NL[for_N] + image_N1 - math.log(components)
        by_text_NL = by_text_NL.where(likelier_NL, -torch.inf)
        score_BL[rows_N] = by_text_NL.where(unseen_BL[rows_N], score_BL[rows_N])
        return score_BL
