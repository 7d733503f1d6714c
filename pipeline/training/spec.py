"""Specification of a training."""

from typing import Any

from pipeline.config import BaseModelConfig, Config, ExpertConfig, RouterConfig, TrainingConfig


class TrainSpec(Config):
    """All that a worker needs to know of its task."""

    FORMER_NAMES = {"group_by_length": "by_length"}

    task: str
    """Name of task and expert."""
    digest: str
    """Names the expert that will come out."""
    identity: dict[str, Any] = {}
    """What the expert depends on, by name; for its card."""
    data_fingerprint: str
    """Of the training rows."""
    seed: int
    """Of weights and data order."""
    base: BaseModelConfig
    """The frozen model."""
    expert: ExpertConfig
    """Expert stage."""
    router: RouterConfig
    """Router stage."""
    training: TrainingConfig
    """Machine."""
    vision: bool = True
    """False: rows hold image features, and the vision tower is not loaded."""
    group_by_length: bool = False
    """Batches of rows of similar length."""
    validation: float = 0.0
    """Share of the rows that are held out, to keep the best adapter."""
    start: str | None = None
    """Adapter folder to go on from, instead of a fresh LoRA (sequential fine-tuning, the method we compare with)."""
    router_stage: bool = True
    """False trains the adapter only."""
