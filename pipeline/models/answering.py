"""Answers of a routed model, each with who gave it: served, evaluated and in bulk."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.models.encoding import Encoded
from pipeline.models.inference import FrozenBase
from pipeline.routing.routed_model import RoutedModel


@dataclass(frozen=True)
class RoutedAnswer:
    """An answer and who gave it."""

    text: str
    expert: str | None
    """The expert with the largest share; None is the base."""
    posterior: float | None
    """`Decision.posterior`."""


def routed_answers(
    frozen: FrozenBase, routed: RoutedModel, rows: Sequence[Encoded], max_new_tokens: int, *, size: int | None = None
) -> list[RoutedAnswer]:
    """Answers prompts by the model's router, in batches of at most `size` (default: the workers'); in their order."""
    answers: dict[int, RoutedAnswer] = {}
    for members, batch in frozen.batches(rows, size):
        with routed.call() as call:
            texts = frozen.answer(batch, max_new_tokens)
        for i, text, decision in zip(members, texts, call.decisions, strict=True):
            answers[i] = RoutedAnswer(text, decision.expert, decision.posterior)
    return [answers[i] for i in range(len(rows))]
