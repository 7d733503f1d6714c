"""What several test files need: prompts, experts, and ways to look at a model. Shapes as in `pipeline.routing`."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import RouterConfig
from pipeline.data.demo.abilities import ABILITIES
from pipeline.models.bases import Base
from pipeline.models.encoding import Encoded, collate, encode
from pipeline.models.families import FAMILIES as BASES
from pipeline.routing import Expert, ExpertCard, Pool, PromptStatistics, RoutedModel
from pipeline.routing.adapters import Adapter
from pipeline.routing.features import feature_width, project_prompts
from pipeline.routing.layer_classifiers import LayerInputHook
from pipeline.routing.null import components
from pipeline.routing.prompt_hooks import PromptFeatureHook

CLAIMS = {"reader": "document", "speaker": "repeat", "painter": "describe"}
"""Which base ability each expert of `claimed_pool` claims."""
LANGUAGE_LINEARS = BASES["internvl"].linears
"""All Linears of the language model's layers."""
GENERAL = "direction"
"""The family that stands for base prompts."""
QUERY_AND_DOWN = r"model\.language_model\.layers\.[02]\..*\.(q_proj|down_proj)"
"""All that `painter` adapts."""


def ask(processor: Any, question: str, *images: Image.Image, answer: str | None = None) -> Encoded:
    """Encodes one question about `images`; with an answer as a training row."""
    messages = [
        {"role": "user", "content": ("" if "<image>" in question else "<image>" * len(images)) + question},
        {"role": "assistant", "content": answer or ""},
    ]
    return encode(processor, messages, images, answer=answer is not None)


def prompts(processor: Any, family: str, count: int, *, seed: int = 0) -> list[Encoded]:
    """Encodes `count` questions of a base ability."""
    random = np.random.default_rng([seed, 5])
    examples = [ABILITIES[family](random) for _ in range(count)]
    return [ask(processor, e.question, *([e.image] if e.image else [])) for e in examples]


def batch_of(base: Base, rows: Sequence[Encoded], side: str = "left") -> dict[str, Tensor]:
    """Pads rows to model inputs, without labels."""
    batch = collate(rows, pad_token_id=base.processor.tokenizer.pad_token_id, side=side)
    del batch["labels"]
    return batch


@torch.inference_mode()
def generate(base: Base, rows: Sequence[Encoded], *, tokens: int = 4, use_cache: bool = True) -> tuple[Tensor, Tensor]:
    """Generates exactly `tokens` tokens greedily; returns them (B, N) and the logits they come from (B, N, V)."""
    output = base.model.generate(
        **batch_of(base, rows),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -tokens:], torch.stack(output.logits, dim=1)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares what `generate` returns: tokens exactly, logits up to rounding."""
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=2e-4)
    assert actual[0].equal(expected[0])


@torch.inference_mode()
def features_of(base: Base, rows: Sequence[Encoded], side: str = "left", prompt_mask: Tensor | None = None) -> Tensor:
    """Returns the prompt features (B, 5 D) as a listener gets them."""
    observed: list[Tensor] = []
    reader = PromptFeatureHook(base.model, lambda features, tokens: observed.append(features))
    reader.prompt_mask = prompt_mask
    base.model(**batch_of(base, rows, side))
    reader.remove()
    (features_BS,) = observed
    return features_BS


def statistics_features(base: Base, rows: Sequence[Encoded]) -> Tensor:
    """Returns the prompt features (B, F) that statistics are taken of, in the default width."""
    return project_prompts(features_of(base, rows), feature_width(base.width, None))


def make_expert(
    base: Base,
    name: str,
    *,
    rank: int = 4,
    seed: int = 0,
    targets: str = LANGUAGE_LINEARS,
    features: Tensor | None = None,
    quantile: float | None = None,
) -> Expert:
    """Makes an expert with random weights for the Linears that match `targets`; `features` (N, F) are its prompts'."""
    random = torch.Generator().manual_seed(seed)
    adapters, vectors = {}, {}
    for path, module in base.model.named_modules():
        if re.fullmatch(targets, path):
            a_RD = torch.randn(rank, module.in_features, generator=random) / module.in_features**0.5
            b_OR = torch.randn(module.out_features, rank, generator=random) / rank**0.5
            adapters[path] = Adapter(a_RD, b_OR, 2.0)
            vectors[path] = torch.randn(module.in_features, generator=random)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    card = ExpertCard(
        name=name,
        task=name,
        base_fingerprint=base.fingerprint,
        rank=rank,
        alpha=2 * rank,
        seed=seed,
        data_fingerprint="data",
        config_digest="digest",
        samples=64,
        metrics={"expert_loss": 0.5},
    )
    if features is None:
        features = torch.randn(16, feature_width(base.width, None), generator=random)
    return Expert(card, config, adapters, vectors, PromptStatistics.of(features, quantile=quantile))


def language_linears(base: Base) -> list[str]:
    """Returns the paths of all Linears of the language model, in the model's order."""
    return [path for path, _ in base.model.named_modules() if re.fullmatch(LANGUAGE_LINEARS, path)]


@torch.inference_mode()
def samples_of(base: Base, rows: Sequence[Encoded], side: str = "left") -> dict[str, Tensor]:
    """Returns what an LayerInputHook takes down of these prompts at all Linears of the language model (B, F)."""
    layer_inputs = LayerInputHook(base.model, language_linears(base))
    reader = PromptFeatureHook(base.model, lambda features, tokens: setattr(layer_inputs, "tokens_BT", tokens))
    base.model(**batch_of(base, rows, side), use_cache=False)
    reader.remove()
    layer_inputs.remove()
    return {path: torch.cat(samples) for path, samples in layer_inputs.samples.items()}


def claimed_pool(base: Base, count: int = 24) -> Pool:
    """Makes a pool that knows `count` prompts of every family in CLAIMS, of GENERAL ones too.

    The experts have different ranks, `painter` adapts some Linears only. Features are those at the language model's
    input, evidence is read at all its Linears with the expert in place.
    """
    experts = []
    for seed, (name, family) in enumerate(CLAIMS.items()):
        rows = prompts(base.processor, family, count)
        targets = QUERY_AND_DOWN if name == "painter" else LANGUAGE_LINEARS
        features = statistics_features(base, rows)
        expert = make_expert(base, name, rank=2 + seed, seed=seed, targets=targets, features=features, quantile=0.99)
        alone = Pool("tiny", base.fingerprint, RouterConfig(), [expert])
        with attached(base, alone) as routed, routed.forced(name):
            layer_statistics = {path: PromptStatistics.of(samples) for path, samples in samples_of(base, rows).items()}
        experts.append(dataclasses.replace(expert, layer_statistics=layer_statistics))
    rows = prompts(base.processor, GENERAL, count)
    null = components(statistics_features(base, rows), 2)
    null_layer_statistics = {path: PromptStatistics.of(samples) for path, samples in samples_of(base, rows).items()}
    return Pool("tiny", base.fingerprint, RouterConfig(), experts, null, null_layer_statistics)


def claimed_prompts(base: Base, count: int = 2, *, seed: int = 1) -> tuple[list[Encoded], list[str | None]]:
    """Returns new prompts of all families in CLAIMS and of GENERAL, and who should answer each."""
    rows, owners = [], []
    for owner in (*CLAIMS, None):
        rows += prompts(base.processor, GENERAL if owner is None else CLAIMS[owner], count, seed=seed)
        owners += [owner] * count
    return rows, owners


@contextmanager
def attached(base: Base, pool: Pool) -> Iterator[RoutedModel]:
    """Routes the base by `pool` while the context lasts."""
    routed = RoutedModel(base.model, pool)
    try:
        yield routed
    finally:
        routed.detach()


def checksum(model: nn.Module) -> str:
    """Returns a digest of all parameters and their names, those of a routed Linear under their own name."""
    weights = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().numpy().tobytes())
    return digest.hexdigest()
