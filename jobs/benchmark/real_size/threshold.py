"""Small tasks: 100 prompts that are read 16 times over, and how many held-out ones lie inside the threshold made of them."""

import torch

from jobs.benchmark.real_size.readings import DEMO, features
from pipeline.config import RouterConfig
from pipeline.routing.statistics import PromptStatistics

ROWS, PASSES = 100, 16


def measure() -> dict[str, float]:
    """Returns `inside_min` over the embedded stream's tasks, and the share of each task's held-out prompts inside."""
    settings, found = RouterConfig(), {}
    for task in DEMO:
        random = torch.Generator().manual_seed(0)
        whole_NS = features(task, "train")
        seen_NS = whole_NS[torch.randperm(len(whole_NS), generator=random)[:ROWS]].repeat(PASSES, 1)
        seen_NS = seen_NS * (
            1 + 1e-7 * torch.randn(seen_NS.shape, generator=random)
        )  # every pass rounds in its own way
        own = PromptStatistics.of(seen_NS, quantile=settings.quantile, shrinkage=settings.shrinkage)
        inside_N = own.distance(features(task, "eval"), shrinkage=settings.shrinkage) <= own.radius
        found[f"inside.{task}"] = float(inside_N.double().mean())
    return {"inside_min": min(found.values())} | found
