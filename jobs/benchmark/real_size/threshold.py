"""Small tasks: how many held-out prompts lie inside the threshold that is made of few.

Once of 100 prompts that are read 16 times over; once of 20 images about which 20 questions each are asked, with other
images held out.
"""

import torch
from torch import Tensor

from jobs.benchmark.real_size.readings import DEMO, features
from pipeline.config import RouterConfig
from pipeline.routing.statistics import PromptStatistics

ROWS, PASSES = 100, 16
IMAGES, QUESTIONS = 20, 20
ASKER = "successor"
"""The task whose questions differ most: its prompts are text only."""


def measure() -> dict[str, float]:
    """Returns `inside_min` over all, and the share of each one's held-out prompts inside: the demo's stream's tasks, and
    questions about few images of theirs.
    """
    settings, inside = RouterConfig(), {}
    for task in DEMO:
        random = torch.Generator().manual_seed(0)
        all_NS = features(task, "train")
        seen_NS = all_NS[torch.randperm(len(all_NS), generator=random)[:ROWS]].repeat(PASSES, 1)
        seen_NS = seen_NS * (1 + 1e-7 * torch.randn(seen_NS.shape, generator=random))  # each pass rounds in its own way
        number_N = torch.arange(ROWS).repeat(PASSES)
        inside[f"inside.{task}"] = _inside(seen_NS, number_N, number_N, features(task, "eval"), settings)
        if bool(seen_NS[:, 0].any()):  # it has images
            inside[f"inside.pictures.{task}"] = _repeated(task, settings)
    return {"inside_min": min(inside.values())} | inside


def _repeated(task: str, settings: RouterConfig) -> float:
    """Returns the same where 20 questions each are asked about 20 of a task's images: those of `ASKER`."""
    image_N = torch.arange(IMAGES).repeat_interleave(QUESTIONS)
    prompt_N = torch.arange(IMAGES * QUESTIONS)
    seen_NS = _about(features(task, "train")[image_N], features(ASKER, "train")[prompt_N])
    held_out_NS = _about(features(task, "eval"), features(ASKER, "eval"))
    return _inside(seen_NS, image_N, IMAGES + prompt_N, held_out_NS, settings)


def _about(images_NS: Tensor, questions_NS: Tensor) -> Tensor:
    """Returns features with the image part (mean and deviation) of the one and the text part of the other."""
    image = 2 * images_NS.shape[1] // 3
    return torch.cat([images_NS[:, :image], questions_NS[:, image:]], dim=1)


def _inside(seen_NS: Tensor, image_N: Tensor, prompt_N: Tensor, held_out_NS: Tensor, settings: RouterConfig) -> float:
    ids_N2 = torch.stack([image_N, prompt_N], dim=1)
    statistics = PromptStatistics.of(seen_NS, ids_N2, quantile=settings.quantile, shrinkage=settings.shrinkage)
    return float(
        (statistics.distance(held_out_NS, shrinkage=settings.shrinkage) <= statistics.threshold).double().mean()
    )
