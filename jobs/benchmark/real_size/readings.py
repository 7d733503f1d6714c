"""Prompt features of the shipped base, for measurements that need no expert: only where a prompt would be sent.

Shapes: N prompts, S source features (5 D), F features, D the base's width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor

from jobs.benchmark.real_size import lookalikes
from jobs.pretrain_tiny import encode_examples
from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.data.demo import abilities, tasks
from pipeline.data.demo.abilities import Example
from pipeline.data.demo.files import base_prompts, held_out
from pipeline.models.bases import Base, load_base
from pipeline.models.encoding import collate
from pipeline.routing.null import components
from pipeline.routing.prompt_hooks import PromptFeatureHook
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import NULL_EXPERT
from pipeline.routing.statistics import PromptStatistics

TRAIN_ROWS, ASKED = 800, 200
"""Prompts of a task that statistics are taken of, and that are routed."""
DEMO = tuple(tasks.TASKS)
"""The demo's stream's tasks."""

Prepare = Callable[[Tensor], Tensor]
"""What is done to features (N, S) before statistics are taken of them: a projection, say."""


@cache
def _base() -> Base:
    return load_base(BaseModelConfig(path="tiny"))


@cache
def features(task: str, part: str) -> Tensor:
    """Returns the features (N, S) of a task's, a family's or a look-alike's `train` or `eval` prompts, unprojected."""
    return read(_examples(task, part))


def _examples(task: str, part: str) -> Sequence[Example]:
    if task == "general":
        return list(base_prompts())
    if task in tasks.TASKS:
        return list(islice(tasks.examples(task, part), TRAIN_ROWS if part == "train" else ASKED))
    if task in abilities.ABILITIES:
        return list(held_out(task))
    return lookalikes.examples(task, TRAIN_ROWS if part == "train" else ASKED, held_out=part == "eval")


class _Observed(Exception):
    """Ends a forward pass before the language model runs."""


@torch.inference_mode()
def read(examples: Sequence[Example]) -> Tensor:
    """Returns the features (N, S) of prompts; of the base, only vision tower, projector and embeddings run."""
    base, observed = _base(), []

    def observe(features_BS: Tensor, tokens_BT: Tensor) -> None:
        observed.append(features_BS)
        raise _Observed

    reader = PromptFeatureHook(base.model, observe)
    rows = encode_examples(base.processor, list(examples), answer=False)
    for start in range(0, len(rows), 100):
        batch = collate(rows[start : start + 100], pad_token_id=base.processor.tokenizer.pad_token_id, side="left")
        del batch["labels"]
        with suppress(_Observed):
            base.model(**batch, use_cache=False)
    reader.remove()
    return torch.cat(observed)


def routed_right(stream: Sequence[str], prepare: Prepare = lambda x_NS: x_NS) -> Mapping[str, float]:
    """Returns by task and base family the share of held-out prompts that reach their expert, or the base."""
    settings = RouterConfig()
    experts = [
        PromptStatistics.of(prepare(features(name, "train")), quantile=settings.quantile, shrinkage=settings.shrinkage)
        for name in stream
    ]
    null = components(prepare(features("general", "train")), settings.null_components)
    router = PromptRouter(experts, null, shrinkage=settings.shrinkage)
    shares = {}
    for name in (*stream, *abilities.BENCHMARKS):
        chosen_B1, _ = router.rank_candidates(prepare(features(name, "eval")), 1)
        shares[name] = float((chosen_B1 == (stream.index(name) if name in stream else NULL_EXPERT)).double().mean())
    return shares


def own_and_base(share_by_name: Mapping[str, float]) -> dict[str, float]:
    """Returns the means over tasks and over base families, without what binary fractions add to a sum."""
    shares: dict[str, list[float]] = {"own": [], "base": []}
    for name, share in share_by_name.items():
        shares["base" if name in abilities.BENCHMARKS else "own"].append(share)
    return {side: round(fmean(of), 9) for side, of in shares.items()}
