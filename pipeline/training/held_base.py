"""The base on which a worker trains task after task: loaded once, and again only when a training wants another one."""

from contextlib import ExitStack
from typing import Any

import ray.train
import torch.distributed as dist

from pipeline.memory import free_memory
from pipeline.models.bases import Base, load_base
from pipeline.training.lockstep import VisionLockstep
from pipeline.training.spec import TrainSpec
from pipeline.training.zero import base_dtype, sharded_loading


class HeldBase:
    """The base of the last training, kept for as long as the next one wants the same."""

    def __init__(self) -> None:
        self._key: Any = None
        self._base: Base | None = None
        self._open = ExitStack()

    def get(self, spec: TrainSpec, settings: dict[str, Any]) -> Base:
        """Returns the base that a training trains on, bare as it was loaded."""
        key = (spec.base, spec.vision, spec.training)
        if self._base is None or key != self._key:
            self.drop()
            self._open.enter_context(sharded_loading(settings))
            self._base = load_base(base_dtype(spec.base, spec.training), vision=spec.vision)
            if spec.training.zero_stage == 3 and dist.get_world_size() > 1:
                VisionLockstep(self._base, ray.train.torch.get_device())
            self._key = key
        return self._base

    def drop(self) -> None:
        """Gives the base back."""
        self._open.close()
        self._open, self._base = ExitStack(), None
        free_memory()
