"""Routing at the widths of real bases: prompt features projected to 128 and 512, against unprojected ones.

The shipped base is 128 wide, so its five parts of 128 are turned into a space of 2,048 each, as lengths and angles stay:
as wide as InternVL-2's 2B, and projected just as there.
"""

from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from jobs.benchmark.real_size.readings import DEMO, Prepare, routed_right
from pipeline.routing.features import IMAGE_PARTS, TEXT_PARTS, project_prompts

WIDTH, TARGETS = 2048, (128, 512)


@cache
def _turn(width: int) -> Tensor:
    """Returns an orthogonal map (D, 2048)."""
    random = torch.randn(WIDTH, width, generator=torch.Generator().manual_seed(3))
    return torch.linalg.qr(random).Q.T


def _projected(target: int) -> Prepare:
    def prepare(features_NS: Tensor) -> Tensor:
        parts = [part_ND @ _turn(part_ND.shape[-1]) for part_ND in features_NS.chunk(TEXT_PARTS + IMAGE_PARTS, dim=-1)]
        return project_prompts(torch.cat(parts, dim=-1), target)

    return prepare


def measure() -> dict[str, float]:
    """Returns `routed_right`, the least of both widths as a share of the unprojected one, and all three as they are."""
    plain = fmean(routed_right(DEMO).values())
    shares = {target: fmean(routed_right(DEMO, _projected(target)).values()) for target in TARGETS}
    by_width = {f"projected_{target}": share for target, share in shares.items()}
    return {"routed_right": min(shares.values()) / plain, "unprojected": plain} | by_width
