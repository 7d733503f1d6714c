"""Elastic weight consolidation (EWC): a penalty that holds weights which earlier tasks need near their values.

    L = L_task + strength / 2 · Σ_i F_i (θ_i - θ*_i)²
    F_i = Σ_t mean over rows of task t of (∂ log p(answer | prompt) / ∂θ_i)²          t: the tasks before

Kirkpatrick et al. 2017, arXiv 1612.00796, with one anchor θ* for all tasks before, where the last one ended (Huszár 2018,
arXiv 1712.03847). F is the empirical Fisher information: of the rows' own answers. A method that we compare with; the weights
are those of one LoRA that goes from task to task.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import stored_file
from pipeline.models.bases import Base
from pipeline.models.encoding import Encoded, collate_for, to_device
from pipeline.training.loss import answer_loss

FISHER = "fisher.safetensors"
"""File in an adapter's folder: Fisher information of its weights, summed over the tasks so far."""
ROWS = 200
"""Rows of a task that its Fisher information is estimated from."""


class ElasticPenalty:
    """The penalty of a model whose trained weights are where the last task has left them; `folder` is that adapter's."""

    def __init__(self, model: nn.Module, folder: Path, strength: float) -> None:
        fisher = read_fisher(folder)
        self._strength = strength
        self._terms = [
            (weight, weight.detach().float().clone(), fisher[name].to(weight.device))
            for name, weight in _trained(model).items()
        ]

    def __call__(self) -> Tensor:
        """Returns the penalty at the present weights."""
        parts = [(fisher * (weight.float() - anchor).square()).sum() for weight, anchor, fisher in self._terms]
        return self._strength / 2 * torch.stack(parts).sum()


def fisher_information(
    model: nn.Module, base: Base, batches: Iterable[Sequence[Encoded] | None], device: torch.device
) -> dict[str, Tensor]:
    """Returns the diagonal Fisher information of the trained weights, by name, over all ranks' rows; float32."""
    trained = _trained(model)
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in trained.items()}
    count = torch.zeros((), dtype=torch.float64, device=device)
    for rows in batches:
        for row in rows or ():
            loss = answer_loss(model, to_device(collate_for(base.processor, [row]), device), reduction="sum")
            # Not `backward`: the engine's hooks would take the gradients for those of a step.
            for total, gradient in zip(sums.values(), torch.autograd.grad(loss, list(trained.values())), strict=True):
                total += gradient.float().square()
            count += 1
    if dist.get_world_size() > 1:
        for total in (count, *sums.values()):
            dist.all_reduce(total)
    return {name: total / max(count.item(), 1.0) for name, total in sums.items()}


def read_fisher(folder: Path) -> dict[str, Tensor]:
    """Reads what `write_fisher` wrote."""
    with stored_file(folder / FISHER, f"remove the folder {folder.parent}, and the training before begins anew"):
        return load_file(folder / FISHER)


def write_fisher(folder: Path, information: dict[str, Tensor], before: Path | None) -> None:
    """Writes Fisher information beside an adapter, with that of the tasks before it, whose adapter's folder is `before`."""
    earlier = read_fisher(before) if before is not None else {}
    total = {name: (value.cpu() + earlier.get(name, 0)).contiguous() for name, value in information.items()}
    save_file(total, folder / FISHER)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
