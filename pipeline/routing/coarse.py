"""Statistics in few features: enough for most decisions, and small enough to keep those of ten thousand experts in memory.

One fixed projection (`features.project_prompts`), the same for every expert ever trained, so that their sums stay sums. What is
decided in few features is a sequential test (Wald, 1945): where one class is e^35 times likelier than any other there, a prompt
of another class would look like that once in e^35 times. For a task that nobody has learned there is no such bound. Measured at
F = 512: of 2,800 prompts of the demo's tasks, of ten that are easily confused and of base abilities 2,654 are decided so, and
all features decide each of them alike; beside a hundred confusable tasks 3,882 of 5,200, all but one alike; of 880 prompts of
tasks that were not learned 668, all but one alike.
Shapes: N prompts, F features, P of them projected, C classes.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.routing.features import project_prompts
from pipeline.routing.statistics import PromptStatistics, upper_half

WIDTH = 128
"""Projected features P: 66 kB per expert in memory."""
CERTAIN = 35.0
"""Lead in log-likelihood from which on a decision is final; its posterior is 1 to float64's last digit."""


def projected(features_NF: Tensor) -> Tensor:
    """Projects prompts (N, F) to few features (N, P), float64."""
    return features_NF.double() @ _matrix(features_NF.shape[-1])


def coarse_statistics(statistics: PromptStatistics) -> PromptStatistics:
    """Returns the same prompts' statistics in few features; reads the scatter."""
    matrix_FP = _matrix(statistics.width)
    scatter_PP = (matrix_FP.T @ statistics.scatter_FF @ matrix_FP).float()
    return _of(statistics, projected(statistics.mean_F[None])[0], scatter_PP)


def packed(few: Sequence[PromptStatistics]) -> Tensor:
    """Returns the upper halves of the scatters of classes (C, P (P + 1) / 2), float32."""
    scatter_CPP = torch.stack([statistics.scatter_FF.float() for statistics in few])
    return scatter_CPP[:, *upper_half(WIDTH)]


def unpacked(classes: Sequence[PromptStatistics], halves_CX: Tensor) -> list[PromptStatistics]:
    """Returns statistics in few features of those in all, of which only the scatter is missing, and what `packed` gave."""
    row, column = upper_half(WIDTH)
    scatter_CPP = torch.empty(len(classes), WIDTH, WIDTH)
    scatter_CPP[:, row, column] = scatter_CPP[:, column, row] = halves_CX
    means_CP = projected(torch.stack([statistics.mean_F for statistics in classes]))
    return [_of(*parts) for parts in zip(classes, means_CP, scatter_CPP, strict=True)]


def _of(statistics: PromptStatistics, mean_P: Tensor, scatter_PP: Tensor) -> PromptStatistics:
    """Returns statistics whose scatter stays float32 in memory."""
    return PromptStatistics(
        statistics.count, mean_P, scatter_PP.double, images=statistics.images, with_image=statistics.with_image
    )


@lru_cache(maxsize=4)
def _matrix(width: int) -> Tensor:
    return project_prompts(torch.eye(width), WIDTH).double()
