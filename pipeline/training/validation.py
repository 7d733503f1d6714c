"""Held-out rows of a task: their loss and accuracy while the adapter is trained, and the best adapter so far."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pipeline.errors import stored_file
from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED, Encoded, collate_for, to_device
from pipeline.training.loss import answer_logits
from pipeline.training.ranks import summed

METRICS, KEPT = "validation.json", "best-"
"""What is written last into the folder of a kept adapter, and how the names of these folders begin."""


@dataclass(frozen=True)
class ValidationPoint:
    """What the held-out rows say after a step."""

    step: int
    loss: float
    """Mean cross-entropy over their answers' tokens."""
    accuracy: float | None = None
    """Share of the rows that greedy decoding answers token for token; None in points of earlier releases."""


@torch.no_grad()
def validate(engine: Any, base: Base, batches: Iterable[Sequence[Encoded] | None], step: int) -> ValidationPoint:
    """Returns loss and accuracy on all ranks' held-out rows, alike on every rank.

    Greedy decoding gives an answer token for token exactly if each of its tokens is the likeliest after those before it: one
    forward pass tells both, and nothing is generated. Every rank gives equally many batches, None where it has no more rows: it
    then runs its last ones again and leaves them out, since ZeRO-3 wants all ranks to run.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    last: Sequence[Encoded] | None = None
    engine.eval()
    for given in batches:
        last = given if given is not None else last
        assert last is not None, "every rank has at least one row"
        batch = to_device(collate_for(base.processor, last), engine.device)
        logits_KV, tokens_K = answer_logits(engine, batch)
        if given is None:
            continue
        loss = functional.cross_entropy(logits_KV.float(), tokens_K, reduction="sum")
        rows_K = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = rows_K[logits_KV.argmax(-1) != tokens_K].unique().numel()
        sums += sums.new_tensor([loss.item(), len(tokens_K), len(last) - wrong, len(last)])
    engine.train()
    total, tokens, right, rows = summed(sums).tolist()
    return ValidationPoint(step, total / max(tokens, 1.0), right / max(rows, 1.0))


class BestAdapter:
    """The best adapter of a training so far, in a folder `best-<step>` of the training's; a run that goes on finds it there.

    `keep` hears of a folder that is complete, on the rank that writes.
    """

    def __init__(self, folder: Path, *, write: bool, keep: Callable[[Path], None] = lambda folder: None) -> None:
        self._folder, self._write, self._keep = folder, write, keep
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
            self._keep(folder)

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
