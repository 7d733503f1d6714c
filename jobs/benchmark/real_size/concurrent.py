"""Prompts answered from several threads at once, on one routed model: who is answered by whom, and with what.

    pointsman benchmark real-size --only concurrent

- A pool of experts with random weights over the base that ships with the project, one for each of a few base abilities:
  every expert answers differently, so a prompt that gets another prompt's expert shows in the text.
- The reference is the same prompts, one by one. A prompt is wrong if expert, or text, differ from it.
- Every kind of router; the prompts are dealt out among them.
"""

import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.data.demo.abilities import ABILITIES
from pipeline.models.bases import Base, load_base
from pipeline.models.encoding import Encoded, collate_for, encode
from pipeline.models.generation import generate_answers
from pipeline.models.tiny import TINY_BASE
from pipeline.routing import Expert, ExpertCard, Pool, PromptStatistics, RoutedModel
from pipeline.routing.adapters import Adapter
from pipeline.routing.features import source_width
from pipeline.routing.layer_classifiers import LayerInputHook
from pipeline.routing.prompt_hooks import PromptFeatureHook

PROMPTS, THREADS = 400, 8
ROUTERS = ("prompt", "two_level", "token")
CLAIMED = {"shapes": "describe", "texts": "document", "words": "repeat"}
"""Experts, and the base ability whose prompts each of them claims."""
GENERAL = "direction"
"""The ability that stands for what the base answers itself."""
KNOWN, RANK, TOKENS = 24, 4, 8
"""Prompts that statistics are made of, the experts' rank, and the longest answer."""


def measure(prompts: int = PROMPTS, threads: int = THREADS) -> dict[str, float]:
    """Returns `wrong`, how many of `prompts` were answered otherwise than alone, and how fast threads are.

    `prompts_per_second` in threads, `prompts_per_second_alone` one by one; `experts` that answered any (the base counts).
    """
    base = load_base(BaseModelConfig(path=str(TINY_BASE)))
    pool = claimed_pool(base)
    abilities = [*CLAIMED.values(), GENERAL]
    rows = [row for i in range(prompts) for row in encoded(base, abilities[i % len(abilities)], 1, seed=1000 + i)]
    used = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of the caller are what is measured
    routed = RoutedModel(base.model, pool)
    wrong, alone_seconds, seconds, experts = 0, 0.0, 0.0, set()
    try:
        for number, router in enumerate(ROUTERS):
            routed.load(pool.routed_by(router=router))
            rows_of_router = rows[number :: len(ROUTERS)]
            started = perf_counter()
            expected = [answer(base, routed, row) for row in rows_of_router]
            alone_seconds += perf_counter() - started
            experts |= {expert for _, expert in expected}
            barrier = threading.Barrier(threads)
            with ThreadPoolExecutor(threads, initializer=barrier.wait) as workers:
                started = perf_counter()
                actual = list(workers.map(lambda row: answer(base, routed, row), rows_of_router))
                seconds += perf_counter() - started
            wrong += sum(f != e for f, e in zip(actual, expected, strict=True))
    finally:
        routed.detach()
        torch.set_num_threads(used)
    return {
        "wrong": wrong,
        "prompts": len(rows),
        "threads": threads,
        "experts": len(experts),
        "prompts_per_second": len(rows) / seconds,
        "prompts_per_second_alone": len(rows) / alone_seconds,
    }


def answer(base: Base, routed: RoutedModel, row: Encoded) -> tuple[str, str | None]:
    """Returns the answer to one prompt, and the expert that gave it (None: the base)."""
    with routed.call() as call:
        (text,) = generate_answers(base.model, base.processor, [row], max_new_tokens=TOKENS)
    return text, call.decisions[0].expert


def encoded(base: Base, ability: str, count: int, *, seed: int) -> list[Encoded]:
    """Encodes `count` questions of a base ability."""
    random = np.random.default_rng(seed)
    rows = []
    for example in (ABILITIES[ability](random) for _ in range(count)):
        images = [example.image] if example.image else []
        question = {"role": "user", "content": "<image>" * len(images) + example.question}
        rows.append(encode(base.processor, [question, {"role": "assistant", "content": ""}], images, answer=False))
    return rows


def claimed_pool(base: Base) -> Pool:
    """Makes an expert with random weights for every ability in CLAIMED, and a null expert that knows GENERAL."""
    experts = []
    for number, (name, ability) in enumerate(CLAIMED.items()):
        expert = random_expert(base, name, number)
        rows = encoded(base, ability, KNOWN, seed=number)
        routed = RoutedModel(base.model, Pool(base.label, base.fingerprint, RouterConfig(), [expert]))
        with routed.forced(name):  # evidence is read with the expert in place
            features_NF, samples = observed(base, list(expert.adapters), rows)
        routed.detach()
        layer_statistics = {path: PromptStatistics.of(inputs) for path, inputs in samples.items()}
        experts.append(
            dataclasses.replace(expert, statistics=PromptStatistics.of(features_NF), layer_statistics=layer_statistics)
        )
    features_NF, samples = observed(base, list(experts[0].adapters), encoded(base, GENERAL, KNOWN, seed=len(CLAIMED)))
    null_layer_statistics = {path: PromptStatistics.of(inputs) for path, inputs in samples.items()}
    null = [PromptStatistics.of(features_NF)]
    return Pool(base.label, base.fingerprint, RouterConfig(), experts, null, null_layer_statistics)


def random_expert(base: Base, name: str, seed: int) -> Expert:
    """Makes an expert whose LoRA is random, so large that its answers are its own."""
    random = torch.Generator().manual_seed(seed)
    adapters = {}
    for path, module in base.model.named_modules():
        if re.fullmatch(base.family.linears, path):
            a_RD = torch.randn(RANK, module.in_features, generator=random) / module.in_features**0.5
            b_OR = torch.randn(module.out_features, RANK, generator=random) / RANK**0.5
            adapters[path] = Adapter(a_RD, b_OR, 2.0)
    card = ExpertCard(
        name=name, task=name, base_fingerprint=base.fingerprint, rank=RANK, alpha=2 * RANK, seed=seed,
        data_fingerprint="random", config_digest="random", samples=KNOWN, metrics={},
    )  # fmt: skip
    return Expert(card, {}, adapters, {}, PromptStatistics.of(torch.zeros(2, source_width(base.width))))


@torch.inference_mode()
def observed(base: Base, paths: list[str], rows: list[Encoded]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the features of prompts (N, F), and the inputs of the Linears at `paths` pooled over each (N, 64)."""
    features: list[Tensor] = []
    layer_inputs = LayerInputHook(base.model, paths)

    def observe(features_BF: Tensor, tokens_BT: Tensor) -> None:
        features.append(features_BF)
        layer_inputs.tokens_BT = tokens_BT

    reader = PromptFeatureHook(base.model, observe)
    batch = collate_for(base.processor, rows, "left")
    del batch["labels"]
    base.model(**batch, use_cache=False)
    reader.remove()
    layer_inputs.remove()
    return torch.cat(features), {path: torch.cat(samples) for path, samples in layer_inputs.samples.items()}
