"""What a session reports while it works: a protocol, so that learning needs no terminal."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pipeline.config import without_secrets
from pipeline.training.telemetry import Step

_logger = logging.getLogger("pointsman")


class StageProgress(Protocol):
    """The training of one task, as it is shown."""

    def update(self, steps: Sequence[Step]) -> None:
        """Shows the latest of these steps."""


class Progress(Protocol):
    """Who shows what goes on; called from several threads."""

    def log(self, text: str, style: str = "") -> None:
        """Tells what is done, or what is to be known; `style` is one of rich's."""

    def show(self, drawn: object) -> None:
        """Shows a table of rich's, or another object that it can print."""

    def working(self, text: str) -> AbstractContextManager[Callable[[str], None]]:
        """Shows that something goes on; yields what is told how far it is, in words."""

    def training(self, task: str) -> AbstractContextManager[StageProgress]:
        """Shows the stages of one task."""


class LoggedProgress:
    """Lines in the log `pointsman`, at INFO: what a notebook or another program gets that asks for nothing else.

    A notebook shows them after `logging.basicConfig(level=logging.INFO)`.
    """

    def log(self, text: str, style: str = "") -> None:
        """Logs a line."""
        _logger.info("%s", without_secrets(text).strip())

    def show(self, drawn: object) -> None:
        """Tables are for terminals: their figures are in the summary."""

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """Logs that something begins."""
        self.log(text)
        yield lambda text: None

    @contextmanager
    def training(self, task: str) -> Iterator["LoggedProgress"]:
        """Logs the stages of one task, by `update`."""
        yield self

    def update(self, steps: Sequence[Step]) -> None:
        """Logs the last step of a stage, every validation and every restart."""
        for step in steps:
            known = {"task": step.task, "stage": step.stage, "step": step.step, "steps": step.steps, "loss": step.loss}
            if step.remark:
                text = step.remark
            elif step.step == step.steps:
                text = f"{step.task}: {step.stage} stage done, loss {step.loss:.3f}"
            else:
                continue
            _logger.info("%s", without_secrets(text), extra=known)
