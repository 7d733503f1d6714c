"""A session over a stream: cluster, base, prepared data, training, evaluation and MLflow; all of it resumable.

Whatever is computed is stored under a name derived from what it is computed from (configuration, data, base), in the
run's folder or in the registry; the same command run again finds it there and goes on with the rest.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cluster.local import ClusterInfo
from cluster.usage import PeakMemory
from pipeline.config import LearnConfig, TaskConfig
from pipeline.data.loading.prompts import PromptSource
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.errors import stored_file
from pipeline.evaluation.actors import PredictorActors
from pipeline.evaluation.choices import Mode
from pipeline.evaluation.evaluate import SAMPLES, Evaluator
from pipeline.evaluation.results import Evaluation
from pipeline.files import atomic_file, write_json
from pipeline.learning.background import begin
from pipeline.learning.capacity import Capacity
from pipeline.learning.identity import Identity
from pipeline.learning.output import Output
from pipeline.learning.progress import Progress
from pipeline.learning.state import REMADE, Tally, keep_peak
from pipeline.learning.stream_data import BASE_PROMPTS, StreamData
from pipeline.learning.training_workers import TrainingWorkers
from pipeline.models.bases import language_width
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.models.target_modules import base_linears
from pipeline.registry.evaluated_prompts import EvaluatedPrompts
from pipeline.registry.experts import MissingExpertError, fetch_expert, find_expert
from pipeline.registry.metric_buffer import MetricBuffer
from pipeline.registry.names import expert_name, pool_name
from pipeline.registry.retries import Retries
from pipeline.routing.adapters import ExpertError
from pipeline.routing.features import feature_width
from pipeline.routing.foreign import foreign_adapter
from pipeline.routing.null import read_null, write_null
from pipeline.routing.pool import EXPERTS, Pool
from pipeline.routing.store import ExpertReference, ExpertStore
from pipeline.training.given import give
from pipeline.training.null_expert import null_statistics
from pipeline.training.session import OnSteps, TrainResult, finished_training
from pipeline.training.spec import GivenAdapter, TrainSpec
from pipeline.training.telemetry import RESTART, Step
from pipeline.training.training_folder import training_folder


def loss_curves(task: str, metrics: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """Returns the points (metric, value, step) of a training's losses."""
    points = [
        (f"{task}/{stage}_loss", loss, step)
        for stage in ("expert", "router")
        for step, loss in enumerate(metrics.get(f"{stage}_losses", ()), 1)
    ]
    for name, key in (("loss", "validation_losses"), ("accuracy", "validation_accuracies")):
        points += [(f"{task}/validation_{name}", value, step) for step, value in metrics.get(key, ())]
    return points


class StreamSession:
    """One session over a stream of tasks; created by `opening.open_session`."""

    def __init__(
        self,
        config: LearnConfig,
        cluster: ClusterInfo,
        progress: Progress,
        memory: PeakMemory,
        *,
        trainings: int | None = None,
        output: Output | None = None,
    ) -> None:
        self.config, self.cluster, self.progress, self.memory = config, cluster, progress, memory
        self.output = output = output or Output(config)
        self.capacity = Capacity(config, cluster, most=trainings)
        self.folder = config.folder
        self.fingerprint = fingerprint(checkpoint(config.base))
        self.identity = Identity(config, self.fingerprint, output.data / "demo")
        self.data = StreamData(config, output, self.identity, self.capacity, progress, self._end_workers)
        self.experiment = self.mlflow_run_id = ""
        self.retry = Retries(config.registry.retry_seconds, progress.log)
        self.metrics = MetricBuffer(self.folder / "state" / "metrics.jsonl", progress.log)
        self._workers = TrainingWorkers(config.training, cluster, self.capacity, progress, storage=output.training)

    @property
    def closed(self) -> bool:
        """Whether nothing is to be trained or evaluated any more."""
        return self._workers.closed

    def log_metrics(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Logs (metric, value, step) points; where the registry is away they wait in the run's folder."""
        self.metrics.log(self.mlflow_run_id, points)

    # Experts

    @cached_property
    def experts(self) -> ExpertStore:
        """The experts of all runs of this output folder, by digest; missing or damaged ones are fetched from the registry."""

        def fetch(reference: ExpertReference, folder: Path) -> None:
            if not self.output.fetch_expert(reference, folder):
                self.retry(partial(fetch_expert, reference, folder), f"fetching expert {reference.name}")

        return ExpertStore(self.output.experts, fetch, keep=self.output.keep_expert)

    def reference(self, task: str, digest_: str) -> ExpertReference:
        """Returns the reference to a task's expert: its digest, and its place in the registry."""
        return ExpertReference(name=task, digest=digest_, model=expert_name(self.config.base.label, task))

    def is_learned(self, task: TaskConfig) -> bool:
        """Whether a run of this output folder or of this registry has learned a task; its files are not read."""
        reference = self.reference(task.name, self.identity.expert(task))
        assert reference.digest is not None
        find = partial(find_expert, self.config.base.label, task.name, reference.digest)
        if self.experts.has(reference) or self.output.has_expert(reference):
            return True
        return self.retry(find, f"looking for expert {task.name}") is not None

    def has_expert(self, reference: ExpertReference) -> bool:
        """Whether an expert is in the store undamaged, or could be brought there; all of its files are read.

        It may come from the registry, or, learned by an earlier release, from the run's own folder.
        """
        try:
            self.experts.verify(reference)
        except (ExpertError, MissingExpertError):
            try:
                self.experts.take(reference, self.folder / EXPERTS / reference.name)
            except ExpertError:
                return False
        return True

    def finished_training(self, task: str, digest_: str) -> TrainResult | None:
        """Returns the result of a training that this run has finished, registered or not."""
        return finished_training(self.output.training, task, digest_)

    def seconds_before(self, reference: ExpertReference) -> float:
        """Returns the training seconds of an interrupted expert up to its last checkpoint."""
        assert reference.digest is not None
        return training_folder(self.output.training, reference.name, reference.digest).seconds()

    def place_of(self, folder: Path) -> str:
        """Returns the name of a folder in the run's training storage, by which workers on any node find it."""
        return folder.relative_to(self.output.training.local).as_posix()

    # Training

    def spec(self, task: TaskConfig, digest_: str, /, **changes: Any) -> tuple[TrainSpec, TrainingRows]:
        """Returns the spec of a task's training and its rows; `changes` adapt the spec for baselines."""
        return self.spec_alone(task, digest_, **changes), self.data.training_rows(task).training_rows([task.name])

    def spec_alone(self, task: TaskConfig, digest_: str, /, **changes: Any) -> TrainSpec:
        """Returns the spec of a task's training."""
        spec = TrainSpec(
            task=task.name,
            digest=digest_,
            identity=self.identity.parts(task),
            data_fingerprint=self.identity.training_rows(task),
            seed=self.config.seed,
            base=self.config.base,
            expert=self.config.expert,
            router=self.config.router,
            training=self.config.training,
            vision=self.data.vision,
            group_by_length=self.config.data.group_by_length,
            validation=task.validation,
            adapter=self._given(task),
        )
        return spec.model_copy(update=changes)

    def _given(self, task: TaskConfig) -> GivenAdapter | None:
        """Puts the LoRA that a task is given, if it is, where its workers find it."""
        if task.adapter is None:
            return None
        return give(foreign_adapter(task.adapter, base_linears(self.config.base)), self.output.training)

    def start_workers(self, expected: Sequence[TrainSpec]) -> None:
        """Starts the workers of trainings that will begin soon, if inference fits beside them; returns at once."""
        self._workers.start(expected)

    def train(self, spec: TrainSpec, rows: TrainingRows) -> TrainResult:
        """Trains, or resumes from the last checkpoint; shows progress and logs loss curves."""
        _ = self._workers.env  # whose making has a line of its own
        with self.progress.training(spec.task) as bar:

            def on_steps(steps: list[Step]) -> None:
                bar.update(steps)
                losses = [s for s in steps if s.stage != RESTART]
                self.log_metrics([(f"{s.task}/{s.stage}_loss", s.loss, s.step) for s in losses])

            trained = self.train_unseen(spec, rows, on_steps)
            self.log_curves(spec.task, trained)
            return trained

    def train_unseen(self, spec: TrainSpec, rows: TrainingRows, on_steps: OnSteps, **watched: Any) -> TrainResult:
        """Trains, or resumes from the last checkpoint, as `Session.train` does; only `on_steps` hears of it."""
        if not self.capacity.side_by_side:  # no evaluation goes on in the background then
            self._predictors.close()
        return self._workers.train(spec, rows, on_steps, **watched)

    def log_curves(self, task: str, trained: TrainResult) -> None:
        """Logs a training's losses, whole: a driver may have been killed before it had logged all steps of its workers."""
        self.log_metrics(loss_curves(task, trained.metrics))

    def end_sessions(self, *, at_once: bool = False) -> None:
        """Stops training workers, in the middle of a step if `at_once`; the next training starts new ones."""
        self._workers.end(at_once=at_once)

    def _end_workers(self) -> None:
        """Stops all workers: those that compute image features do not fit beside them."""
        self._predictors.close()
        self.end_sessions()

    def make_room(self) -> None:
        """Stops training workers if inference workers do not fit beside them."""
        if not self.capacity.side_by_side:
            self.end_sessions()

    def close(self, *, at_once: bool = False) -> None:
        """Stops training and inference workers, in the middle of a step if `at_once`."""
        self._workers.close()
        if "_predictors" in self.__dict__:
            self._predictors.close(for_good=True)
        self.end_sessions(at_once=at_once)
        self.data.close()

    # Pools and their evaluation

    def null_expert(self) -> dict[str, Any]:
        """Returns what the base prompts give a pool (`null`, `null_layer_statistics`); nothing where the stream has none."""
        key = self.identity.base_prompts
        if key is None:
            return {}
        file = self._state(f"general-{key}.safetensors")
        if not file.exists():
            prompts = self.data.base_prompts.rows([BASE_PROMPTS])
            with self.progress.working("computing statistics of the base prompts"):
                null, layer_statistics = null_statistics(
                    prompts,
                    self.config.base,
                    wanted_width=self.config.router.feature_width,
                    null_components=self.config.router.null_components,
                    targets=self.config.expert.target_modules,
                    workers=self.capacity.inference,
                    vision=self.data.vision,
                )
            with atomic_file(file) as staging:
                write_null(staging, null, layer_statistics)
        with stored_file(file, REMADE):
            null, layer_statistics = read_null(file)
            return {"null": null, "null_layer_statistics": layer_statistics}

    @property
    def pool_model(self) -> str:
        """The registered model of the stream's pool."""
        return pool_name(self.config.base.label, self.config.pool)

    def pool_key(self, pool: Pool) -> str:
        """Returns the name of a pool with this run's base prompts."""
        return self.identity.pool(pool.digests, pool.router)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator; its prompts and answers are kept below the output folder, for all runs."""
        config, data = self.config, self.data
        return Evaluator(
            PromptSource(config.base, config.data, data.demo_folder, data.features, self.capacity.inference),
            self.output.data.local,
            answers=self.identity.answers,
            max_new_tokens=config.evaluation.max_new_tokens,
            width=feature_width(language_width(config.base), config.router.feature_width),
            quarantine=data.quarantine / "eval",
            on_set_aside=partial(data.tell_set_aside, split="eval"),
            make_room=self.make_room,
            pull=self.output.pull,
        )

    def peak_memory(self) -> int:
        """Returns the largest memory of all processes here so far, over all restarts of the run, in bytes."""
        return keep_peak(self._state("peak-memory.json"), self.memory.bytes)

    @cached_property
    def generated(self) -> Tally:
        """Number of answers generated while learning: by the base, and by pools with the configured router."""
        return Tally(self._state("answers.json"))

    @cached_property
    def _predictors(self) -> PredictorActors:
        """The predictors; they start with the first prompt without a stored answer and live through the session."""
        return self.evaluator.actors()

    def evaluate_soon(
        self, names: Sequence[str], pool: Pool, pool_digest: str, *, folder: Path | None = None
    ) -> Future[Evaluation]:
        """Starts evaluating a pool, without samples. If evaluators have CPUs or GPUs of their own, it runs in the
        background.

        Pools whose Linears choose are evaluated now: they are read from a folder in which the next one will lie.
        """
        evaluate = partial(self.evaluate, names, pool, pool_digest, folder=folder, samples=0)
        if self.capacity.undisturbed and pool.router.kind == "prompt":
            return begin(partial(evaluate, quietly=True), name="evaluating")
        done: Future[Evaluation] = Future()
        done.set_result(evaluate())
        return done

    def evaluate(
        self,
        names: Sequence[str],
        pool: Pool | None,
        pool_digest: str,
        mode: Mode = "routed",
        *,
        folder: Path | None = None,
        samples: int = SAMPLES,
        quietly: bool = False,
        who: str = "",
    ) -> Evaluation:
        """Evaluates a pool on tasks and benchmarks, or reads the stored result.

        `folder` is where the pool lies, for routers whose Linears choose; `who` is what progress calls it. Of each column
        `samples` predictions are kept, with the reasons of the router, which cost as much as its choices: accuracies alone
        need none.
        """
        key = self.identity.evaluation([self.data.eval_tasks[name] for name in names], pool_digest, mode)
        place = None if folder is None else self.output.place.at(folder)
        full, brief = (self._state(f"evaluation-{key}{end}.json") for end in ("", "-brief"))
        file = full if samples or full.exists() else brief
        if not file.exists():
            tasks = [self.data.eval_task(name) for name in names]
            shown = self.progress.working(f"evaluating {who + ' on ' if who else ''}{len(names)} tasks and benchmarks")
            before = self.evaluator.generated
            with nullcontext() if quietly else shown:
                if pool is not None and place is not None:
                    self.output.share_pool(pool, place)
                try:
                    result = self.evaluator.evaluate(
                        tasks,
                        pool,
                        key=pool_digest,
                        folder=place,
                        mode=mode,
                        samples=samples,
                        actors=self._predictors,
                    )
                finally:
                    if pool is None or (mode == "routed" and pool.router == self.config.router):
                        self.generated.add(self.evaluator.generated - before)
            write_json(file, result.to_json())
        with stored_file(file, REMADE):
            return Evaluation.from_json(json.loads(file.read_text()))

    @cached_property
    def scored_rows(self) -> dict[str, str]:
        """Digests of the evaluation prompts by task and benchmark."""
        return {name: self.identity.scored_rows(task) for name, task in self.data.eval_tasks.items()}

    def evaluated_prompts(self, name: str, pool: Pool) -> EvaluatedPrompts:
        """Returns the evaluation prompts of a task or benchmark that `pool` was evaluated on, with their scores."""
        return self.evaluator.record(self.data.eval_task(name), pool, self._predictors)

    def _state(self, name: str) -> Path:
        folder = self.folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name
