"""What every rank of a training session does: training after training on one base, an expert stage and a router stage each."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from pipeline import json_logs
from pipeline.data.loading.batch_loader import BatchLoader, StepLayout, distinct_batches
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.errors import StoredFileError
from pipeline.memory import free_memory
from pipeline.models.bases import Base
from pipeline.models.encoding import collate_for
from pipeline.models.target_modules import adapted_paths, observed_paths
from pipeline.routing.adapters import ExpertError, load_adapters
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.features import feature_width
from pipeline.routing.statistics import PromptStatistics
from pipeline.storage.mirror import Mirror
from pipeline.training.elastic_weights import ROWS, ElasticPenalty, fisher_information, write_fisher
from pipeline.training.expert_stage import save_lora, warm_up_cosine, with_lora, without_lora
from pipeline.training.given import given_folder
from pipeline.training.held_base import HeldBase
from pipeline.training.loop import Divergence, StageClock, run_steps
from pipeline.training.loss import checkpoint_activations, without_dropout
from pipeline.training.monitor import Monitor
from pipeline.training.preemption import PreemptionNotice
from pipeline.training.randomness import seed_all
from pipeline.training.router_stage import with_gates, without_gates
from pipeline.training.spec import GivenAdapter, TrainSpec
from pipeline.training.statistics_collector import LayerInputCollector, collect_features
from pipeline.training.telemetry import Sent
from pipeline.training.training_folder import (
    ADAPTER,
    EXPERT,
    STATE,
    TrainingFolder,
    load_state,
    save_state,
    training_folder,
)
from pipeline.training.validation import BestAdapter, validate
from pipeline.training.zero import (
    close_engine,
    gathered,
    start_engine,
    zero_config,
)

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

ALREADY_FINISHED = "found"
"""Key in a training's outcome: it was finished before, so its steps are not reported."""

GIVEN_UP = "given up"
"""Key in a training's outcome: nobody wanted it any more, and it can go on from its last checkpoint."""

REPORT_EVERY = 0.8
"""Seconds between messages to the driver."""


def train(settings: dict[str, Any]) -> None:
    """Works on the session's trainings until there are no more; Ray Train runs this on every rank.

    `settings`: the `queue` and the run's `storage`. A training's outcome is rank 0's metrics (losses, seconds and data wait of
    both stages), `failure` with the reason where a retry would fail again (divergence, nothing learned, a damaged file), or
    GIVEN_UP: all ranks see those alike. What one rank alone meets must be raised: the others would wait for it.
    """
    with settings["storage"].on_this_node() as storage:
        _train(settings["queue"], storage)


def _train(queue: Any, storage: Mirror) -> None:
    rank, base = ray.train.get_context().get_world_rank(), HeldBase()
    if json_logs.are_wanted():
        json_logs.use_json_logs(run=storage.local.parent.name, rank=rank)
    queue.enter.remote(rank, ray.get_runtime_context().current_actor)
    number = _agreed(ray.get(queue.first.remote()) if rank == 0 else None)
    try:
        while (entry := ray.get(queue.take.remote(number))) is not None:
            spec = TrainSpec.model_validate(entry[0])
            folder = training_folder(storage, spec.task, spec.digest, rank)
            # Workers may have died after the last step, before they reported it; those of a driver that was killed go on for
            # a moment.
            finished = _agreed(folder.metrics() if rank == 0 else None)
            metrics = (
                _work(spec, ray.get(entry[1][0]), queue, storage, folder, base)
                if finished is None
                else finished | {ALREADY_FINISHED: True}
            )
            entry = None  # the rows
            folder.forget()
            free_memory()
            if rank == 0:
                ray.get(queue.finish.remote(number, metrics))
            number += 1
    finally:
        base.drop()


def _work(
    spec: TrainSpec, rows: TrainingRows, queue: Any, storage: Mirror, folder: TrainingFolder, base: HeldBase
) -> dict[str, Any]:
    """Does one training; returns its outcome."""
    worker = None
    try:
        worker = Worker(spec, rows, queue, storage, folder, base)
        return worker.run()
    except _GivenUp:
        return {GIVEN_UP: True}
    except (Divergence, ExpertError, StoredFileError) as error:
        base.drop()  # adapters and engine are still on it
        return {"failure": str(error)}
    finally:
        if worker is not None:
            worker.report()  # the last losses before a failure are those one wants to see


class _GivenUp(Exception):
    """Ends a training that nobody wants any more; adapters and engine are off the base."""


def _agreed(value: Any) -> Any:
    """Returns rank 0's value on every rank."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


class Worker:
    """One rank."""

    def __init__(
        self, spec: TrainSpec, rows: TrainingRows, queue: Any, storage: Mirror, folder: TrainingFolder, base: HeldBase
    ) -> None:
        context = ray.train.get_context()
        self.spec, self.queue, self.base = spec, queue, base
        self.rows = rows
        self.held_out: TrainingRows | None = None
        if spec.validation:
            self.rows, self.held_out = rows.split(spec.validation, spec.seed)
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.storage, self.folder = storage, folder
        folder.fetch()
        self.best = BestAdapter(folder.path, write=self.rank == 0, keep=folder.keep)
        share = -(-spec.expert.batch_size // self.world)
        micro_batch = min(spec.training.micro_batch or share, share)
        self.layout = StepLayout(spec.expert.batch_size, self.world, micro_batch)
        self.dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
        torch.set_num_threads(spec.training.cpus_per_worker)
        self._pending: list[Sent] = []
        self._reported_at, self._began, self._before = 0.0, time.monotonic(), 0.0
        self.metrics: dict[str, Any] = {"samples": spec.expert.steps * spec.expert.batch_size}

    def run(self) -> dict[str, Any]:
        """Runs what the last checkpoint leaves to do, both stages on one base: the LoRA is taken off, gates come on."""
        spec, checkpoint = self.spec, self.folder.last()
        progress: dict[str, Any] = {"stage": "expert", "step": 0, "figures": {}}
        if checkpoint is not None:
            progress = self.folder.progress()
            self._before = progress.get("seconds", 0.0)
        self.metrics |= progress["figures"]
        settings = self._zero_config()
        base = self.base.get(spec, settings)
        adapted_paths(base.model, base.family, spec.expert.target_modules)
        if spec.adapter is not None:
            adapter = self._given(spec.adapter)
        elif progress["stage"] == "expert":
            adapter = self._expert_stage(base, settings, checkpoint, progress)
            free_memory()
        else:
            assert checkpoint is not None
            adapter = checkpoint / ADAPTER
        if spec.router_stage:
            self._router_stage(base, settings, adapter)
        elif self.rank == 0:
            self.folder.finish(self.metrics, lambda checkpoint_dir: shutil.copytree(adapter, checkpoint_dir / ADAPTER))
        return self.metrics

    def _expert_stage(
        self, base: Base, settings: dict[str, Any], folder: Path | None, progress: dict[str, Any]
    ) -> Path:
        """Trains the LoRA, and takes it off the base; returns the folder of the finished adapter."""
        spec, config = self.spec, self.spec.expert
        seed_all(spec.seed)  # the same for all ranks: weights
        start = self.storage.fetched(spec.start) if spec.start else None
        peft: Any = with_lora(base, config, start=start, dtype=self.dtype)
        penalty: ElasticPenalty | None = None
        if spec.elasticity is not None and start is not None:
            penalty = ElasticPenalty(peft, start, spec.elasticity)
        if spec.training.gradient_checkpointing:
            checkpoint_activations(base)
        engine = start_engine(
            peft,
            settings,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            schedule=warm_up_cosine(config),
        )
        seed_all(spec.seed, 1, self.rank)  # each rank's own: dropout
        begin, clock = 0, StageClock()
        if folder is not None and (folder / STATE).exists():  # not in those of earlier releases
            load_state(engine, folder, progress["step"], ranks=progress["world"])
            begin, clock = progress["step"], StageClock(**progress["clock"])
        engine.train()

        notice, wanted = PreemptionNotice(), True
        monitor = self._monitor("expert", config.steps)

        def on_step(step: int, loss: float) -> bool:
            nonlocal wanted
            self._step_done("expert", step, config.steps, loss)
            monitor.step(step, loss, clock)
            enough = self._validate(engine, base, peft, step)
            wanted = enough or step == config.steps or self._is_wanted(step)
            due = step % spec.training.checkpoint_every == 0 and step < config.steps and not enough
            if due or not wanted:
                keep(step)
            return enough or not wanted

        def meet(step: int) -> None:
            if notice.given() and step < config.steps:
                keep(step)

        def keep(step: int) -> None:
            checkpoint_dir = self._checkpoint({"stage": "expert", "step": step, "clock": vars(clock)})
            save_state(engine, checkpoint_dir)
            self.folder.commit(checkpoint_dir)

        steps = range(begin, config.steps)
        with self._loader(base, steps, spec.seed) as loader:
            run_steps(
                engine,
                loader,
                steps,
                divergence_factor=spec.training.divergence_factor,
                clock=clock,
                on_step=on_step,
                wanted=notice.due,
                meet=meet,
                penalty=penalty,
            )
        if not wanted:
            close_engine(engine)
            without_lora(base, peft)
            raise _GivenUp
        self._note("expert", clock)
        self.metrics["samples"] = len(clock.losses) * config.batch_size
        checkpoint_dir = self._checkpoint({"stage": "router", "step": 0})
        if self.best.point is None:
            save_lora(peft, checkpoint_dir / ADAPTER, write=self.rank == 0)
        elif self.rank == 0:
            self.best.copy(checkpoint_dir / ADAPTER)
        if spec.elasticity is not None:
            self._keep_fisher(peft, base, engine.device, checkpoint_dir / ADAPTER, start)
        close_engine(engine)
        without_lora(base, peft)
        adapter = self.folder.commit(checkpoint_dir) / ADAPTER
        if not any(bool(a.b_OR.any()) for a in load_adapters(adapter)[1].values()):
            raise ExpertError(
                f"task {spec.task!r}: every LoRA B is zero after training; check expert.learning_rate and steps"
            )
        return adapter

    def _keep_fisher(self, peft: Any, base: Base, device: Any, adapter: Path, before: Path | None) -> None:
        """Writes the Fisher information of the trained LoRA beside it, with that of the tasks before."""
        batches = distinct_batches(
            self.rows,
            count=max(ROWS, self.world),
            micro_batch=1,
            rank=self.rank,
            workers=self.world,
            seed=self.spec.seed,
        )
        information = fisher_information(peft, base, batches, device)
        if self.rank == 0:
            write_fisher(adapter, information, before)

    def _given(self, given: GivenAdapter) -> Path:
        """Returns the folder of an adapter that was trained elsewhere, in place of an expert stage that takes no time."""
        folder = given_folder(given, self.storage)
        self.metrics |= {"samples": 0, "expert_seconds": 0.0, "expert_wait_seconds": 0.0}
        self.metrics |= {"expert_losses": [], "expert_step_seconds": []}
        return folder

    def _validate(self, engine: Any, base: Base, peft: Any, step: int) -> bool:
        """Looks at the held-out rows every `validate_every` steps and keeps the best adapter; returns whether to stop."""
        config, rows = self.spec.expert, self.held_out
        if rows is None or not self._is_validated(step):
            return False
        batches = distinct_batches(
            rows, count=rows.count, micro_batch=self.layout.micro_batch, rank=self.rank, workers=self.world, seed=0
        )
        point = validate(engine, base, batches, step)
        self.best.offer(point, lambda folder: save_lora(peft, folder, write=self.rank == 0))
        for name, value in (("losses", point.loss), ("accuracies", point.accuracy)):
            self.metrics.setdefault(f"validation_{name}", []).append([step, value])
        assert self.best.point is not None, "offered one"
        if self.best.point.accuracy is not None:
            self.metrics["validation_accuracy"] = self.best.point.accuracy
        self._step_done("validation", step, config.steps, point.loss, point.accuracy)
        return config.patience is not None and step - self.best.point.step >= config.patience * config.validate_every

    def _is_validated(self, step: int) -> bool:
        config = self.spec.expert
        return self.held_out is not None and (step % config.validate_every == 0 or step == config.steps)

    def _is_wanted(self, step: int) -> bool:
        """Whether somebody still waits for this training; asked after validations, by which that is decided."""
        if not self._is_validated(step):
            return True
        return bool(_agreed(ray.get(self.queue.is_wanted.remote()) if self.rank == 0 else None))

    def _router_stage(self, base: Base, settings: dict[str, Any], adapter: Path) -> None:
        """Trains the routing vectors, takes the prompt statistics and writes the finished expert."""
        spec, config = self.spec, self.spec.router
        started = time.monotonic()
        observed = observed_paths(base, spec.expert.target_modules)
        adapter_config, adapters = load_adapters(adapter)  # now: rank 0 removes the checkpoint when it is done
        gates = with_gates(base.model, adapters, dtype=self.dtype)
        engine = start_engine(
            base.model, settings, learning_rate=config.learning_rate, weight_decay=0.0, schedule=lambda step: 1.0
        )
        if spec.training.gradient_checkpointing:
            checkpoint_activations(base)
        without_dropout(engine)  # nothing but the gates moves
        seed_all(spec.seed, 2, self.rank)
        features, ids = self._features(engine, base)
        layer_inputs = LayerInputCollector(base.model, observed)
        clock, monitor = StageClock(), self._monitor("router", config.steps)

        def on_step(step: int, loss: float) -> None:
            self._step_done("router", step, config.steps, loss)
            monitor.step(step, loss, clock)

        steps = range(config.steps)
        with self._loader(base, steps, spec.seed + 1) as loader:
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
        self._note("router", clock)
        card = ExpertCard(
            name=spec.task,
            task=spec.task,
            base_fingerprint=base.fingerprint,
            rank=spec.adapter.rank if spec.adapter else spec.expert.rank,
            alpha=spec.adapter.alpha if spec.adapter else spec.expert.lora_alpha,
            seed=spec.seed,
            data_fingerprint=spec.data_fingerprint,
            config_digest=spec.digest,
            identity=spec.identity | ({"adapter": spec.adapter.content} if spec.adapter else {}),
            trained_with=spec.training.model_dump(include=HOW)
            | ({"adapter": spec.adapter.source} if spec.adapter else {}),
            samples=self.metrics["samples"],
            metrics={key: value for key, value in self.metrics.items() if isinstance(value, float)},
        )
        expert = Expert(card, adapter_config, adapters, vectors, statistics, samples)
        expert.check_trained()
        if self.rank == 0:
            self.folder.finish(self.metrics, lambda checkpoint_dir: expert.save(checkpoint_dir / EXPERT))

    def _features(self, engine: Any, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features (N, F) and ids (N, 2) of distinct prompts of all ranks."""
        config = self.spec.router
        batches = distinct_batches(
            self.rows,
            count=max(config.statistics_rows, self.world),
            micro_batch=self.layout.micro_batch,
            rank=self.rank,
            workers=self.world,
            seed=self.spec.seed,
        )
        width = feature_width(base.width, config.feature_width)
        return collect_features(engine, base, batches, width=width, device=engine.device)

    def _zero_config(self) -> dict[str, Any]:
        spec = self.spec
        return zero_config(
            spec.training,
            micro_batch=self.layout.micro_batch,
            accumulated=self.layout.accumulation,
            max_grad_norm=spec.expert.max_grad_norm,
        )

    def _loader(self, base: Base, steps: range, seed: int) -> BatchLoader:
        return BatchLoader(
            self.rows,
            layout=self.layout,
            rank=self.rank,
            steps=steps,
            seed=seed,
            collate=partial(collate_for, base.processor),
            group_by_length=self.spec.group_by_length,
        )

    def _monitor(self, stage: str, steps: int) -> Monitor:
        return Monitor(
            self.storage.local,
            self.spec.task,
            stage,
            rank=self.rank,
            steps=steps,
            rows_per_step=self.spec.expert.batch_size,
        )

    def _note(self, stage: str, clock: StageClock) -> None:
        last = clock.losses[-20:]
        self.metrics |= {
            f"{stage}_seconds": clock.seconds,
            f"{stage}_wait_seconds": clock.wait_seconds,
            f"{stage}_loss": sum(last) / len(last),
            f"{stage}_losses": clock.losses,
            f"{stage}_step_seconds": clock.step_seconds,
        }

    def _step_done(self, stage: str, step: int, steps: int, loss: float, accuracy: float | None = None) -> None:
        """Tells the driver of a step, several at a time: a remote call costs about a millisecond of the step's time.

        Of a validation it hears at once, since it may decide whether the training goes on.
        """
        if self.rank != 0:
            return
        self._pending.append((self.spec.task, stage, step, steps, loss, "", accuracy))
        if step == steps or stage == "validation" or time.monotonic() - self._reported_at >= REPORT_EVERY:
            self.report()

    def report(self) -> None:
        """Tells the driver of the steps that it does not know yet."""
        if self._pending:
            self.queue.push.remote(self._pending)
            self._pending, self._reported_at = [], time.monotonic()

    def _checkpoint(self, progress: dict[str, Any]) -> Path:
        """Starts a checkpoint that says where this training stands."""
        seconds = self._before + time.monotonic() - self._began
        return self.folder.checkpoint_dir(
            {"world": self.world, "seconds": seconds, "figures": self.metrics, **progress}
        )
