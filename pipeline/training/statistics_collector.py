"""What routers need to know of a task's prompts, collected from distinct rows while its expert is trained.

Features come from one pass over distinct prompts, in which the language model's layers do not run; the inputs of the
Linears from the router stage's own forward passes, from those of their rows that are new. Shapes: N prompts, F features.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED, Encoded, collate_for, ids, to_device
from pipeline.routing.features import project_prompts
from pipeline.routing.layer_classifiers import LayerInputHook
from pipeline.routing.prompt_hooks import PromptFeatureHook


def prompt_mask(batch: dict[str, Any]) -> Tensor:
    """Returns which tokens of training rows are prompt (B, T): those that carry no label."""
    return batch["attention_mask"].bool() & (batch["labels"] == IGNORED)


@torch.no_grad()
def collect_features(
    run: Any, base: Base, batches: Iterable[Sequence[Encoded] | None], *, width: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """Returns prompt features (N, `width`) and ids (N, 2) of all ranks' batches of rows, alike on every rank.

    `run` is the base or the engine around it. Every rank gives equally many batches, None where it has no more rows: it
    then runs its last ones again and leaves them out, since ZeRO-3 wants all ranks to run.
    """
    features_and_ids: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor] = []
    reader = PromptFeatureHook(base.model, lambda features, tokens: seen.append(features))
    last: Sequence[Encoded] | None = None
    try:
        with _without_layers(base):
            for given in batches:
                last = given if given is not None else last
                assert last is not None, "every rank has at least one row"
                batch = to_device(collate_for(base.processor, last), device)
                reader.prompt_mask = prompt_mask(batch)
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                run(**inputs, logits_to_keep=1, use_cache=False)
                (features_BS,) = seen
                seen.clear()
                if given is not None:
                    features_and_ids.append((project_prompts(features_BS, width).cpu(), ids(given)))
    finally:
        reader.remove()
    features, given_ids = zip(*(part for parts in over_ranks(features_and_ids) for part in parts), strict=True)
    return torch.cat(features), torch.cat(given_ids)


@contextmanager
def _without_layers(base: Base) -> Iterator[None]:
    """Leaves a language model its embeddings only."""
    language: Any = base.model.get_submodule(base.family.language)
    layers = language.layers
    language.layers = nn.ModuleList()
    try:
        yield
    finally:
        language.layers = layers


class LayerInputCollector:
    """Collects the pooled inputs of the Linears at `paths` from training rows."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._reader = LayerInputHook(model, paths)

    def expect(self, batch: dict[str, Any], rows: int) -> None:
        """Says that of the coming forward pass the first `rows` rows are to be recorded."""
        if rows:
            self._reader.tokens_BT = prompt_mask(batch)[:rows]

    def collect(self) -> dict[str, Tensor]:
        """Takes the hooks off; returns the samples (N, F) of every distinct input of all ranks' rows, alike on every rank."""
        self._reader.remove()
        value = {path: torch.cat(samples) for path, samples in self._reader.samples.items()}
        parts = over_ranks(value)
        paths = dict.fromkeys(path for part in parts for path in part)
        return {path: torch.cat([part[path] for part in parts if path in part]) for path in paths}


def over_ranks(value: Any) -> list[Any]:
    """Returns what every rank has, in the order of ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts
