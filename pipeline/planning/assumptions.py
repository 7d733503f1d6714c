"""Quantities of a plan that its user may know better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """Quantities that a configuration does not hold."""

    tiles: int = 6
    """Tiles of a typical row, thumbnail included."""
    text_tokens: int = 200
    """Text tokens of a typical row: template, question and answer."""
    answer_tokens: int = 64
    """Answer tokens of a typical row."""
    longest_answer: int = 512
    """Answer tokens of the longest row; at least `answer_tokens`. Mostly images and documents make a row long, but captions and
    explanations have hundreds of tokens."""
    utilisation: float = 0.35
    """Share of the GPU's operations that training reaches."""
    prompts: int = 1000
    """Evaluation prompts per task or benchmark without `evaluation.limit`."""
