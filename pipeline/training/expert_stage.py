"""Expert stage: PEFT LoRA on every Linear of the language model, loss on answer tokens only."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import ExpertConfig
from pipeline.data.loading.batch_loader import BatchLoader
from pipeline.models.bases import Base
from pipeline.routing.adapters import ExpertError, load_adapters
from pipeline.training.elastic_weights import ROWS, ElasticPenalty, fisher_information, write_fisher
from pipeline.training.loop import StageClock, run_steps
from pipeline.training.lora import save_lora, with_lora, without_lora
from pipeline.training.loss import checkpoint_activations
from pipeline.training.preemption import PreemptionNotice
from pipeline.training.randomness import seed_all
from pipeline.training.training import GivenUp, Training
from pipeline.training.training_folder import ADAPTER, STATE, load_state, save_state
from pipeline.training.validation import BestAdapter, validate
from pipeline.training.zero import close_engine, start_engine


def warm_up_cosine(config: ExpertConfig) -> Callable[[int], float]:
    """Returns the learning-rate factor by step: linear warm-up, then half a cosine down to zero."""
    rising = max(1, round(config.warmup_ratio * config.steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, config.steps - rising)))

    return factor


def run_expert_stage(training: Training, base: Base, checkpoint: Path | None, progress: dict[str, Any]) -> Path:
    """Trains the LoRA from where the `checkpoint` stands, and takes it off the base; returns the finished adapter's folder.

    Raises GivenUp where nobody wants it any more, ExpertError where nothing was learned, Divergence.
    """
    begin, clock = 0, StageClock()
    if checkpoint is not None and not (checkpoint / STATE).exists():  # of an earlier release
        checkpoint = None
    if checkpoint is not None:
        begin, clock = progress["step"], StageClock(**progress["clock"])
    steps = range(begin, training.spec.expert.steps)
    # Entered first: the processes that read streamed rows take seconds to start, as does the engine.
    with training.loader(base, steps, training.spec.seed) as loader:
        return _ExpertStage(training, base, clock).run(loader, steps, checkpoint, progress)


class _ExpertStage:
    """The stage on one rank, while it lasts."""

    def __init__(self, training: Training, base: Base, clock: StageClock) -> None:
        self.training, self.base, self.clock = training, base, clock
        spec = training.spec
        self.spec, self.steps = spec, spec.expert.steps
        self.best = BestAdapter(training.folder.path, write=training.rank == 0, keep=training.folder.keep)
        seed_all(spec.seed)  # the same for all ranks: weights
        self.start = training.storage.fetched(spec.start) if spec.start else None
        self.peft: Any = with_lora(base, spec.expert, start=self.start, dtype=training.dtype)
        self.penalty: ElasticPenalty | None = None
        if spec.elasticity is not None and self.start is not None:
            self.penalty = ElasticPenalty(self.peft, self.start, spec.elasticity)
        if spec.training.gradient_checkpointing:
            checkpoint_activations(base)
        self.engine = start_engine(
            self.peft,
            training.zero_config(),
            learning_rate=spec.expert.learning_rate,
            weight_decay=spec.expert.weight_decay,
            schedule=warm_up_cosine(spec.expert),
        )
        seed_all(spec.seed, 1, training.rank)  # each rank's own: dropout
        self.wanted = True

    def run(self, loader: BatchLoader, steps: range, checkpoint: Path | None, progress: dict[str, Any]) -> Path:
        """Takes the steps; returns the folder of the finished adapter."""
        training, notice = self.training, PreemptionNotice()
        if checkpoint is not None:
            load_state(self.engine, checkpoint, progress["step"], ranks=progress["world"])
        self.engine.train()
        monitor = training.monitor("expert", self.steps)

        def on_step(step: int, loss: float) -> bool:
            training.reports.step("expert", step, self.steps, loss)
            monitor.step(step, loss, self.clock)
            enough = self._validate(step)
            self.wanted = enough or step == self.steps or not self._is_validated(step) or training.is_wanted()
            due = step % self.spec.training.checkpoint_every == 0 and step < self.steps and not enough
            if due or not self.wanted:
                self._keep(step)
            return enough or not self.wanted

        def meet(step: int) -> None:
            if notice.given() and step < self.steps:
                self._keep(step)

        run_steps(
            self.engine,
            loader,
            steps,
            divergence_factor=self.spec.training.divergence_factor,
            clock=self.clock,
            on_step=on_step,
            wanted=notice.due,
            meet=meet,
            penalty=self.penalty,
        )
        if not self.wanted:
            self._leave()
            raise GivenUp
        return self._finish()

    def _keep(self, step: int) -> None:
        checkpoint_dir = self.training.checkpoint({"stage": "expert", "step": step, "clock": vars(self.clock)})
        save_state(self.engine, checkpoint_dir)
        self.training.folder.commit(checkpoint_dir)

    def _validate(self, step: int) -> bool:
        """Looks at the held-out rows every `validate_every` steps and keeps the best adapter; returns whether to stop."""
        config, rows, training = self.spec.expert, self.training.held_out, self.training
        if rows is None or not self._is_validated(step):
            return False
        batches = training.distinct(rows, count=rows.count, micro_batch=training.layout.micro_batch, seed=0)
        point = validate(self.engine, self.base, batches, step)
        self.best.offer(point, lambda folder: save_lora(self.peft, folder, write=training.rank == 0))
        for name, value in (("losses", point.loss), ("accuracies", point.accuracy)):
            training.metrics.setdefault(f"validation_{name}", []).append([step, value])
        assert self.best.point is not None, "offered one"
        if self.best.point.accuracy is not None:
            training.metrics["validation_accuracy"] = self.best.point.accuracy
        training.reports.step("validation", step, self.steps, point.loss, point.accuracy)
        return config.patience is not None and step - self.best.point.step >= config.patience * config.validate_every

    def _is_validated(self, step: int) -> bool:
        """Whether held-out rows are looked at after a step; by them it is decided whether a training is still wanted."""
        due = step % self.spec.expert.validate_every == 0 or step == self.steps
        return self.training.held_out is not None and due

    def _finish(self) -> Path:
        """Writes the adapter and takes it off the base; returns its folder."""
        training, spec = self.training, self.spec
        training.note("expert", self.clock)
        training.metrics["samples"] = len(self.clock.losses) * spec.expert.batch_size
        checkpoint_dir = training.checkpoint({"stage": "router", "step": 0})
        if self.best.point is None:
            save_lora(self.peft, checkpoint_dir / ADAPTER, write=training.rank == 0)
        elif training.rank == 0:
            self.best.copy(checkpoint_dir / ADAPTER)
        if spec.elasticity is not None:
            self._keep_fisher(checkpoint_dir / ADAPTER)
        self._leave()
        adapter = training.folder.commit(checkpoint_dir) / ADAPTER
        if not any(bool(a.b_OR.any()) for a in load_adapters(adapter)[1].values()):
            raise ExpertError(
                f"task {spec.task!r}: every LoRA B is zero after training; check expert.learning_rate and steps"
            )
        return adapter

    def _keep_fisher(self, adapter: Path) -> None:
        """Writes the Fisher information of the trained LoRA beside it, with that of the tasks before."""
        training = self.training
        rows = training.distinct(training.rows, count=max(ROWS, training.world), micro_batch=1, seed=self.spec.seed)
        information = fisher_information(self.peft, self.base, rows, self.engine.device)
        if training.rank == 0:
            write_fisher(adapter, information, self.start)

    def _leave(self) -> None:
        close_engine(self.engine)
        without_lora(self.base, self.peft)
