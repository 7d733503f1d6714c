"""Specification of a training."""

from typing import Any

from pydantic import model_validator

from pipeline.config import BaseModelConfig, Config, ExpertConfig, RouterConfig, TrainingConfig


class GivenAdapter(Config):
    """A LoRA that was trained elsewhere (`given.give`)."""

    content: str
    """Digest of what it computes (`foreign.ForeignAdapter.content`)."""
    source: str
    """What it was called where it came from."""
    rank: int
    """Its rank, in place of `expert.rank`."""
    alpha: float
    """Its alpha."""


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
    elasticity: float | None = None
    """Strength of the penalty of elastic weight consolidation (`elastic_weights`) on moving away from `start`, a method we
    compare with; the adapter's folder then holds its Fisher information."""
    router_stage: bool = True
    """False trains the adapter only."""
    adapter: GivenAdapter | None = None
    """This LoRA is the expert's: there is no expert stage, the router stage alone sees the rows. `digest` must depend on it."""

    @model_validator(mode="after")
    def _a_given_adapter_is_not_trained(self) -> "TrainSpec":
        if self.adapter is not None and (self.start is not None or not self.router_stage):
            raise ValueError("an adapter that is given is not trained further, and has a router stage")
        return self
