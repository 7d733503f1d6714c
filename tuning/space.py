"""What a sweep tries: LoRA ranks and router temperatures, every combination."""

from pydantic import field_validator

from pipeline.config import Config


class SweepSpace(Config):
    """A grid: one training per rank, one evaluation per temperature."""

    ranks: tuple[int, ...] = (4, 8, 16)
    """LoRA ranks."""
    temperatures: tuple[float, ...] = (0.2, 1.0, 5.0)
    """Temperatures of the token router."""

    @field_validator("ranks", "temperatures")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) <= 0 or len(set(values)) != len(values):
            raise ValueError("give one or more different positive values")
        return values
