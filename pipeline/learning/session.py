"""A session over a stream: cluster, base, prepared data, training, evaluation and MLflow; all of it resumable.

Whatever is computed is stored under a name derived from what it is computed from (configuration, data, base), in the
run's folder or in the registry; the same command run again finds it there and goes on with the rest.
"""

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cluster.local import ClusterInfo
from cluster.preflight import build_deepspeed_ops
from cluster.usage import PeakMemory
from pipeline.config import LearnConfig, SourceConfig, TaskConfig
from pipeline.data.loading.preprocess import PreparedData, TaskRows, prepare
from pipeline.data.loading.prompts import PromptSource
from pipeline.data.loading.training_rows import TrainingRows
from pipeline.data.rows.quarantine import SetAside
from pipeline.errors import stored_file
from pipeline.evaluation.actors import PredictorActors
from pipeline.evaluation.choices import Mode
from pipeline.evaluation.evaluate import SAMPLES, Evaluator
from pipeline.evaluation.prompts import EvalTask
from pipeline.evaluation.results import Evaluation
from pipeline.files import atomic_file, write_json
from pipeline.learning.background import begin
from pipeline.learning.capacity import Capacity
from pipeline.learning.identity import BASE_PROMPT, Identity
from pipeline.learning.progress import Progress
from pipeline.learning.state import REMADE, Tally
from pipeline.models.bases import language_width
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.registry.experts import MissingExpertError, experts_name, fetch_expert
from pipeline.registry.patience import Patience
from pipeline.registry.spool import MetricSpool
from pipeline.routing.adapters import ExpertError
from pipeline.routing.features import feature_width
from pipeline.routing.null import read_null, write_null
from pipeline.routing.pool import EXPERTS, Pool
from pipeline.routing.store import ExpertReference, ExpertStore
from pipeline.training.null_expert import null_statistics
from pipeline.training.session import TrainResult
from pipeline.training.sessions import Sessions
from pipeline.training.spec import TrainSpec
from pipeline.training.telemetry import Step
from pipeline.training.training_folder import TrainingFolder

BASE_PROMPTS = "base_prompts"
"""Name of the base prompts among the prompts."""

PREPARING = "preparing DeepSpeed (once on a machine, up to a minute)"


class StreamSession:
    """One session over a stream of tasks; created by `opening.open_session`."""

    def __init__(self, config: LearnConfig, cluster: ClusterInfo, progress: Progress, memory: PeakMemory) -> None:
        self.config, self.cluster, self.progress, self.memory = config, cluster, progress, memory
        self.capacity = Capacity(config, cluster)
        self.folder = config.folder
        self.fingerprint = fingerprint(checkpoint(config.base))
        self.data_folder = Path(config.output).resolve() / "data" / "demo"
        self.identity = Identity(config, self.fingerprint, self.data_folder)
        self.eval_tasks: dict[str, TaskConfig] = {t.name: t for t in (*config.stream.tasks, *config.stream.benchmarks)}
        self.mlflow_run_id = ""
        self.patience = Patience(config.registry.patience, progress.say)
        self.metrics = MetricSpool(self.folder / "state" / "metrics.jsonl", progress.say)
        self._training: dict[str, Future[PreparedData]] = {}
        self._sessions: Sessions | None = None
        self._lock, self._encoding = threading.Lock(), threading.Lock()
        self.closed = False
        """Whether nothing is to be trained or evaluated any more."""

    def log(self, points: Iterable[tuple[str, float, int]]) -> None:
        """Logs (metric, value, step) points; where the registry is away they wait in the run's folder."""
        self.metrics.log(self.mlflow_run_id, points)

    # Data

    def training_rows(self, task: TaskConfig) -> PreparedData:
        """Reads, validates and encodes a task's training rows (once in a run)."""
        self._make_room_for_features()
        self._begin_to_read(task)
        return self._training[task.name].result()

    def read_ahead(self, task: TaskConfig) -> None:
        """Begins to read a task's training rows, in the background; errors are raised when the rows are needed.

        Not where that takes workers that are at work elsewhere meanwhile: they compute image features.
        """
        if self.vision or self.capacity.side_by_side:
            self._begin_to_read(task)

    def _begin_to_read(self, task: TaskConfig) -> None:
        assert task.train is not None
        parts = {task.name: (task.train, task.prompt)}
        read = partial(self._prepare, parts, "train", answer=True)
        with self._lock:
            if task.name not in self._training:
                self._training[task.name] = begin(read, name=f"reading {task.name}")

    def all_training_rows(self) -> TrainingRows:
        """Returns the training rows of all tasks at once, for multi-task training; `data.cache` applies to all of them."""
        parts = {}
        for task in self.config.stream.tasks:
            assert task.train is not None
            parts[task.name] = task.train.model_copy(update={"cache": None}), task.prompt
        self._make_room_for_features()
        return self._prepare(parts, "train", answer=True).training_rows(list(parts))

    def release(self, task: TaskConfig) -> None:
        """Frees a task's encoded training rows: memory must not grow with the number of tasks."""
        self._training.pop(task.name, None)

    def _make_room_for_features(self) -> None:
        """Stops evaluators and training workers if the image encoders do not fit beside them."""
        if not self.vision and not self.capacity.side_by_side:
            self._predictors.close()
            self.end_sessions()

    @cached_property
    def base_prompts(self) -> PreparedData:
        """The base prompts, as `BASE_PROMPTS`."""
        return self.read_prompts([BASE_PROMPTS])

    def read_prompts(self, names: Sequence[str]) -> PreparedData:
        """Reads the evaluation prompts of these tasks and benchmarks, or the base prompts, as `BASE_PROMPTS`."""
        parts: dict[str, tuple[SourceConfig, str]] = {}
        for name in names:
            task = self.eval_tasks.get(name)
            if task is not None:
                parts[name] = self._limited(task.eval), task.prompt
            elif self.config.stream.base_prompts is not None:
                parts[name] = self.config.stream.base_prompts, BASE_PROMPT
        whose = f"{len(parts)} tasks and benchmarks" if len(parts) > 1 else " ".join(parts)
        what = "the base prompts" if list(parts) == [BASE_PROMPTS] else f"the prompts of {whose}"
        with self.progress.working(f"reading {what}"):
            prepared = self._prepare(parts, "eval", answer=False)
        for name in parts:
            self.tell_set_aside(prepared, name, "eval")
        return prepared

    def tell_set_aside(self, prepared: PreparedData, name: str, split: str) -> None:
        """Shows how many rows of a task (`split` train or eval) were set aside, if any, and in which file."""
        if aside := prepared.aside[name]:
            self.progress.say(f"  {name}: {aside}: {self.folder}/quarantine/{split}/{name}.jsonl")

    def _limited(self, source: SourceConfig) -> SourceConfig:
        limit = self.config.evaluation.limit
        return source.model_copy(update={"limit": min(limit, source.limit or limit)}) if limit else source

    @property
    def vision(self) -> bool:
        """Whether training and inference need the vision tower; not with cached image features."""
        return self.config.data.vision_cache == "off"

    def _prepare(self, sources_: Mapping[str, tuple[SourceConfig, str]], split: str, *, answer: bool) -> PreparedData:
        config = self.config
        parts = {}
        for name, (source, prompt) in sources_.items():
            metric = self.eval_tasks[name].metric if name in self.eval_tasks and not answer else None
            key = self.identity.encoded_rows(source, prompt, answer=answer, metric=metric)
            parts[name] = TaskRows(source, prompt, key=key, metric=metric)
        # One set of workers computes the image features of rows to be learned, whoever asks.
        with self._encoding if answer and not self.vision else nullcontext():
            return prepare(
                parts,
                config.data,
                base=self.config.base,
                data_folder=self.data_folder,
                quarantine=self.folder / "quarantine" / split,
                answer=answer,
                embeds_folder=Path(self.config.output).resolve() / "data" / "features",
                workers=self.capacity.inference,
            )

    def null_expert(self) -> dict[str, Any]:
        """Returns what the base prompts give a pool (`null`, `null_layer_statistics`); nothing where the stream has none."""
        key = self.identity.base_prompts
        if key is None:
            return {}
        file = self._state(f"general-{key}.safetensors")
        if not file.exists():
            prompts = self.base_prompts.rows([BASE_PROMPTS])
            with self.progress.working("computing statistics of the base prompts"):
                null, layer_statistics = null_statistics(
                    prompts,
                    self.config.base,
                    wanted_width=self.config.router.feature_width,
                    null_components=self.config.router.null_components,
                    targets=self.config.expert.target_modules,
                    workers=self.capacity.inference,
                    vision=self.vision,
                )
            with atomic_file(file) as staging:
                write_null(staging, null, layer_statistics)
        with stored_file(file, REMADE):
            null, layer_statistics = read_null(file)
            return {"null": null, "null_layer_statistics": layer_statistics}

    # Experts

    @cached_property
    def experts(self) -> ExpertStore:
        """The experts of all runs of this output folder, by digest; missing or damaged ones are fetched from the registry."""

        def fetch(reference: ExpertReference, folder: Path) -> None:
            self.patience(partial(fetch_expert, reference, folder), f"fetching expert {reference.name}")

        return ExpertStore(Path(self.config.output) / EXPERTS, fetch)

    def reference(self, task: str, digest_: str) -> ExpertReference:
        """Returns the reference to a task's expert: its digest, and its place in the registry."""
        return ExpertReference(name=task, digest=digest_, model=experts_name(self.config.base.label))

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

    def has_trained(self, reference: ExpertReference) -> bool:
        """Whether this run has finished training an expert, even if its metrics are not written yet."""
        return self._training_folder(reference.name, reference.digest).metrics() is not None

    def seconds_before(self, reference: ExpertReference) -> float:
        """Returns the training seconds of an interrupted expert up to its last checkpoint."""
        folder = self._training_folder(reference.name, reference.digest)
        return float(folder.progress().get("seconds", 0.0)) if folder.last() else 0.0

    def _training_folder(self, task: str, digest_: str | None) -> TrainingFolder:
        return TrainingFolder(self.folder / "training" / f"{task}-{digest_}")

    # Training

    def spec(self, task: TaskConfig, digest_: str, /, **changes: Any) -> tuple[TrainSpec, TrainingRows]:
        """Returns the spec of a task's training and its rows; `changes` adapt the spec for baselines."""
        return self.spec_alone(task, digest_, **changes), self.training_rows(task).training_rows([task.name])

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
            vision=self.vision,
            group_by_length=self.config.data.group_by_length,
            validation=task.validation,
        )
        return spec.model_copy(update=changes)

    @cached_property
    def worker_env(self) -> dict[str, str]:
        """Environment variables of training workers; without GPUs, DeepSpeed's operator is compiled first, on every node."""
        if self.config.training.gpu:
            return {}
        if self.cluster.started:  # so it has been prepared
            return build_deepspeed_ops()
        with self.progress.working(PREPARING):
            return build_deepspeed_ops()

    def train(self, spec: TrainSpec, rows: TrainingRows) -> TrainResult:
        """Trains, or resumes from the last checkpoint; shows progress and logs loss curves meanwhile."""
        worker_env = self.worker_env
        with self.progress.training(spec.task) as bar:

            def on_steps(steps: list[Step]) -> None:
                bar.update(steps)
                self.log([(f"{s.task}/{s.stage}_loss", s.loss, s.step) for s in steps])

            if not self.capacity.side_by_side:  # no evaluation goes on in the background then
                self._predictors.close()
            with self._lock:
                if self.closed:
                    raise RuntimeError(f"{spec.task}: the run has ended")
                if self._sessions is None:
                    storage = self.folder / "training"
                    count = self.capacity.trainings
                    self._sessions = Sessions(count, spec.training, storage=storage, worker_env=worker_env)
                sessions = self._sessions
            return sessions.train(spec, rows, on_steps)

    def end_sessions(self, *, at_once: bool = False) -> None:
        """Stops training workers, in the middle of a step if `at_once`; the next training starts new ones."""
        with self._lock:
            sessions, self._sessions = self._sessions, None
        if sessions is not None:
            sessions.close(at_once=at_once)

    def make_room(self) -> None:
        """Stops training workers if inference workers do not fit beside them."""
        if not self.capacity.side_by_side:
            self.end_sessions()

    def close(self, *, at_once: bool = False) -> None:
        """Stops training and inference workers, in the middle of a step if `at_once`."""
        with self._lock:
            self.closed = True
        if "_predictors" in self.__dict__:
            self._predictors.close(for_good=True)
        self.end_sessions(at_once=at_once)

    # Evaluation

    def pool_key(self, pool: Pool) -> str:
        """Returns the name of a pool with this run's base prompts."""
        return self.identity.pool(pool.digests, pool.router)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The evaluator; its prompts and answers are kept below the output folder, for all runs."""
        config, data = self.config, Path(self.config.output).resolve() / "data"

        def tell(name: str, aside: SetAside) -> None:
            self.progress.say(f"  {name}: {aside}: {self.folder}/quarantine/eval/{name}.jsonl")

        return Evaluator(
            PromptSource(config.base, config.data, self.data_folder, data / "features", self.capacity.inference),
            data,
            answers=self.identity.answers,
            max_new_tokens=config.evaluation.max_new_tokens,
            width=feature_width(language_width(config.base), config.router.feature_width),
            quarantine=self.folder / "quarantine" / "eval",
            on_set_aside=tell,
            make_room=self.make_room,
        )

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
        key = self.identity.evaluation([self.eval_tasks[name] for name in names], pool_digest, mode)
        full, brief = (self._state(f"evaluation-{key}{end}.json") for end in ("", "-brief"))
        file = full if samples or full.exists() else brief
        if not file.exists():
            tasks = [self._eval_task(self.eval_tasks[name]) for name in names]
            shown = self.progress.working(f"evaluating {who + ' on ' if who else ''}{len(names)} tasks and benchmarks")
            before = self.evaluator.generated
            with nullcontext() if quietly else shown:
                try:
                    result = self.evaluator.evaluate(
                        tasks,
                        pool,
                        key=pool_digest,
                        folder=folder,
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

    def _eval_task(self, task: TaskConfig) -> EvalTask:
        source = self._limited(task.eval)
        key = self.identity.encoded_rows(source, task.prompt, answer=False, metric=task.metric)
        return EvalTask(task, TaskRows(source, task.prompt, key=key, metric=task.metric))

    def _state(self, name: str) -> Path:
        folder = self.folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name
