"""Small experts for benchmarks of the registry, and a registry as an earlier release wrote it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mlflow import MlflowClient

from pipeline.config import BaseModelConfig
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.registry.names import former_names
from pipeline.registry.tracking import log_dataset
from pipeline.routing import Expert, ExpertCard, PromptStatistics
from pipeline.routing.adapters import Adapter

BASE = BaseModelConfig()
"""The base that ships with the project."""

WIDTH, FEATURES = 128, 128
LINEAR = "model.language_model.layers.0.self_attn.q_proj"


def synthetic_expert(name: str, seed: int, base_fingerprint: str, features: int = FEATURES) -> Expert:
    """Returns an expert of one small Linear: a registry looks into no weights."""
    random = torch.Generator().manual_seed(seed)
    adapter = Adapter(torch.randn(2, WIDTH, generator=random), torch.randn(WIDTH, 2, generator=random), 2.0)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": r".*\.q_proj",
        "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    card = ExpertCard(
        name=name, task=name, base_fingerprint=base_fingerprint, rank=2, alpha=4, seed=seed, data_fingerprint="0" * 16,
        config_digest=f"{seed:012x}", samples=1000, metrics={},
    )  # fmt: skip
    statistics = PromptStatistics.of(seed + torch.randn(2 * features, features, generator=random))
    return Expert(card, config, {LINEAR: adapter}, {LINEAR: torch.ones(WIDTH)}, statistics)


def synthetic_null(features: int = FEATURES, components: int = 12) -> list[PromptStatistics]:
    """Returns statistics of made-up base prompts, by default of as many components as `router.null_components`."""
    random = torch.Generator().manual_seed(features)
    return [PromptStatistics.of(k + torch.randn(32, features, generator=random)) for k in range(components)]


def former_registry(experiment: str, run_id: str, label: str, stream: str) -> None:
    """Writes what an earlier release did: two experts, one of them half made a second time, and two pools.

    The pool of the first expert is the champion. `stream` is the name that the run has.
    """
    client, names = MlflowClient(), former_names(label)
    client.log_param(run_id, "name", stream)
    for name in names:
        client.create_registered_model(name)

    def register(name: str, folder: Path, alias: str, **tags: str) -> None:
        model = client.create_logged_model(experiment, "x", run_id, tags=tags)
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        version = client.create_model_version(
            name, f"models:/{model.model_id}", run_id, tags=tags, model_id=model.model_id
        )
        client.set_registered_model_alias(name, alias, version.version)

    base_fingerprint = fingerprint(checkpoint(BASE))
    with TemporaryDirectory() as scratch:
        for seed, task in enumerate(("digits", "clock"), start=1):
            expert = synthetic_expert(task, seed, base_fingerprint)
            folder = expert.save(Path(scratch) / task)
            digest = expert.card.config_digest
            data = expert.card.data_fingerprint
            log_dataset(run_id, task, f"{task}.jsonl", data, samples=1000)
            tags = {"task": task, "rank": "2", "data_fingerprint": data}
            register(names.experts, folder, task, config_digest=digest, finished="true", **tags)
        register(names.experts, folder, "half", config_digest="half", task="clock", rank="2")
        for digest in ("pool-1", "pool-2"):
            register(names.pools, folder, "champion", config_digest=digest, finished="true")
        client.set_registered_model_alias(names.pools, "champion", "1")
        register(names.bases, folder, "current", config_digest="base", finished="true")
