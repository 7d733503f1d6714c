"""Held-out rows of a task: their loss while the adapter is trained, and the best adapter so far."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import stored_file
from pipeline.models.bases import Base
from pipeline.models.encoding import Encoded, collate_for, to_device
from pipeline.training.loop import answer_tokens, over_ranks
from pipeline.training.loss import answer_loss

METRICS, KEPT = "validation.json", "best-"
"""What is written last into the folder of a kept adapter, and how the names of these folders begin."""


@torch.no_grad()
def held_out_loss(engine: Any, base: Base, batches: Iterable[Sequence[Encoded] | None]) -> float:
    """Returns the mean cross-entropy over the answer tokens of all ranks' rows, alike on every rank.

    Every rank gives equally many batches, None where it has no more rows: it then runs its last ones again and leaves them out,
    since ZeRO-3 wants all ranks to run.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    last: Sequence[Encoded] | None = None
    engine.eval()
    for given in batches:
        last = given if given is not None else last
        assert last is not None, "every rank has at least one row"
        batch = to_device(collate_for(base.processor, last), engine.device)
        loss = answer_loss(engine, batch, reduction="sum")
        if given is not None:
            sums += torch.stack([loss.double(), loss.new_tensor(answer_tokens(batch)).double()])
    engine.train()
    total, tokens = over_ranks(sums).tolist()
    return total / max(tokens, 1.0)


@dataclass(frozen=True)
class ValidationPoint:
    """The loss on the held-out rows after a step."""

    step: int
    loss: float


class BestAdapter:
    """The best adapter of a training so far, in a folder `best-<step>` of the training's; a run that goes on finds it there."""

    def __init__(self, folder: Path, *, write: bool) -> None:
        self._folder, self._write = folder, write
        self.point = min((point for point, _ in self._kept()), key=lambda point: point.loss, default=None)

    def offer(self, point: ValidationPoint, save: Callable[[Path], None]) -> None:
        """Has `save` write the adapter into a folder if it is better than those before; all ranks call it alike."""
        if self.point is not None and not point.loss < self.point.loss:
            return
        self.point = point
        folder = self._folder_of(point.step)
        if self._write:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        save(folder)
        if self._write:
            (folder / METRICS).write_text(json.dumps(vars(point)))
            for other in self._folder.glob(f"{KEPT}*"):
                if other != folder:
                    shutil.rmtree(other)

    def copy(self, target: Path) -> None:
        """Copies the best adapter to a new folder."""
        assert self.point is not None, "callers have asked"
        shutil.copytree(self._folder_of(self.point.step), target, ignore=shutil.ignore_patterns(METRICS))

    def _folder_of(self, step: int) -> Path:
        return self._folder / f"{KEPT}{step}"

    def _kept(self) -> Iterator[tuple[ValidationPoint, Path]]:
        for file in self._folder.glob(f"{KEPT}*/{METRICS}"):
            with stored_file(file, f"remove the folder {file.parent}"):
                point = ValidationPoint(**json.loads(file.read_text()))
            yield point, file.parent
