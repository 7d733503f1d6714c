"""Router stage: base and expert are frozen, one routing vector per Linear is trained, and prompt statistics are taken."""

import time
from pathlib import Path
from typing import Any

import torch

from pipeline.models.bases import Base
from pipeline.models.target_modules import observed_paths
from pipeline.routing.adapters import load_adapters
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.features import feature_width
from pipeline.routing.statistics import PromptStatistics
from pipeline.training.gates import with_gates, without_gates
from pipeline.training.loop import StageClock, run_steps
from pipeline.training.loss import checkpoint_activations, without_dropout
from pipeline.training.randomness import seed_all
from pipeline.training.statistics_collector import LayerInputCollector, collect_features
from pipeline.training.training import Training
from pipeline.training.training_folder import EXPERT
from pipeline.training.zero import close_engine, gathered, start_engine

HOW = {
    "workers",
    "gpu",
    "cpus_per_worker",
    "zero_stage",
    "precision",
    "micro_batch",
    "gradient_checkpointing",
    "offload",
}
"""Settings of the machine that an expert's card keeps."""


def run_router_stage(training: Training, base: Base, adapter: Path) -> None:
    """Trains the routing vectors of the `adapter` in a folder, takes the prompt statistics and writes the finished expert."""
    spec, config, started = training.spec, training.spec.router, time.monotonic()
    observed = observed_paths(base, spec.expert.target_modules)
    adapter_config, adapters = load_adapters(adapter)  # now: rank 0 removes the checkpoint when it is done
    gates = with_gates(base.model, adapters, dtype=training.dtype)
    engine = start_engine(
        base.model,
        training.zero_config(),
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        schedule=lambda step: 1.0,
    )
    if spec.training.gradient_checkpointing:
        checkpoint_activations(base)
    without_dropout(engine)  # nothing but the gates moves
    seed_all(spec.seed, 2, training.rank)
    features, ids = _features(training, engine, base)
    layer_inputs = LayerInputCollector(base.model, observed)
    clock, monitor = StageClock(), training.monitor("router", config.steps)

    def on_step(step: int, loss: float) -> None:
        training.reports.step("router", step, config.steps, loss)
        monitor.step(step, loss, clock)

    steps = range(config.steps)
    with training.loader(base, steps, spec.seed + 1) as loader:
        run_steps(
            engine,
            loader,
            steps,
            divergence_factor=spec.training.divergence_factor,
            clock=clock,
            on_step=on_step,
            before=lambda i, batch: layer_inputs.expect(batch, loader.new_rows(config.statistics_rows)[i]),
        )
    statistics = PromptStatistics.of(features, ids, quantile=config.quantile, shrinkage=config.shrinkage)
    samples = {path: PromptStatistics.of(sample) for path, sample in layer_inputs.collect().items()}
    with gathered([gate.vector for gate in gates.values()]):
        vectors = {path: gate.vector.detach().float().cpu().clone() for path, gate in gates.items()}
    close_engine(engine)
    without_gates(base.model, gates)
    clock.seconds = time.monotonic() - started
    training.note("router", clock)
    card = _card(training, base.fingerprint)
    expert = Expert(card, adapter_config, adapters, vectors, statistics, samples)
    expert.check_trained()
    if training.rank == 0:
        training.folder.finish(training.metrics, lambda checkpoint_dir: expert.save(checkpoint_dir / EXPERT))


def _features(training: Training, engine: Any, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features (N, F) and ids (N, 2) of distinct prompts of all ranks."""
    config = training.spec.router
    batches = training.distinct(
        training.rows,
        count=max(config.statistics_rows, training.world),
        micro_batch=training.layout.micro_batch,
        seed=training.spec.seed,
    )
    width = feature_width(base.width, config.feature_width)
    return collect_features(engine, base, batches, width=width, device=engine.device)


def _card(training: Training, base_fingerprint: str) -> ExpertCard:
    spec, given = training.spec, training.spec.adapter
    return ExpertCard(
        name=spec.task,
        task=spec.task,
        base_fingerprint=base_fingerprint,
        rank=given.rank if given else spec.expert.rank,
        alpha=given.alpha if given else spec.expert.lora_alpha,
        seed=spec.seed,
        data_fingerprint=spec.data_fingerprint,
        config_digest=spec.digest,
        identity=spec.identity | ({"adapter": given.content} if given else {}),
        trained_with=spec.training.model_dump(include=HOW) | ({"adapter": given.source} if given else {}),
        samples=training.metrics["samples"],
        metrics={key: value for key, value in training.metrics.items() if isinstance(value, float)},
    )
