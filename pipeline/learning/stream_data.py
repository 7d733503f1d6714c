"""The rows of a stream: its tasks' training rows, the evaluation prompts of tasks and benchmarks, and the base prompts.

Rows are read, validated and encoded once, under a name derived from what they are computed from.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from functools import cached_property, partial

from pipeline.config import LearnConfig, SourceConfig, TaskConfig
from pipeline.data.errors import StreamError
from pipeline.data.loading.preprocess import PreparedData, TaskRows, prepare
from pipeline.data.loading.training_rows import TrainingRows, mixture
from pipeline.data.rows.quarantine import SetAside
from pipeline.evaluation.prompts import EvalTask
from pipeline.learning.background import begin
from pipeline.learning.capacity import Capacity
from pipeline.learning.identity import BASE_PROMPT, Identity
from pipeline.learning.output import Output
from pipeline.learning.progress import Progress

BASE_PROMPTS = "base_prompts"
"""Name of the base prompts among the prompts."""


CLOSING_SECONDS = 15.0
"""Seconds for which closing waits for what is being read."""


class StreamData:
    """Reads the rows of a stream; may be called from several threads.

    `make_room` stops workers elsewhere, where the image encoders do not fit beside them.
    """

    def __init__(
        self,
        config: LearnConfig,
        output: Output,
        identity: Identity,
        capacity: Capacity,
        progress: Progress,
        make_room: Callable[[], object],
    ) -> None:
        self._config, self._identity, self._capacity, self._progress = config, identity, capacity, progress
        self._make_room, self._shown = make_room, output.shown
        self.eval_tasks: dict[str, TaskConfig] = {t.name: t for t in (*config.stream.tasks, *config.stream.benchmarks)}
        """Tasks and benchmarks by name."""
        self.demo_folder = identity.data_folder
        """Where the rows of the built-in demo are written."""
        self.quarantine = config.folder / "quarantine"
        """Where the rows that were set aside are written."""
        self.features = output.data / "features"
        """Where image features are kept."""
        self._training: dict[str, Future[PreparedData]] = {}
        self._lock, self._encoding = threading.Lock(), threading.Lock()
        self._closed = False

    @property
    def vision(self) -> bool:
        """Whether training and inference need the vision tower; not with cached image features."""
        return self._config.data.vision_cache == "off"

    def training_rows(self, task: TaskConfig) -> PreparedData:
        """Returns a task's training rows; they are kept until `release`."""
        self._make_room_for_features()
        self._begin_to_read(task)
        return self._training[task.name].result()

    def read_ahead(self, task: TaskConfig) -> None:
        """Begins to read a task's training rows, in the background; errors are raised when the rows are needed.

        Not where that takes workers that are at work elsewhere meanwhile: they compute image features.
        """
        if self.vision or self._capacity.side_by_side:
            self._begin_to_read(task)

    def release(self, task: TaskConfig) -> None:
        """Frees a task's training rows: memory must not grow with the number of tasks."""
        self._training.pop(task.name, None)

    def close(self) -> None:
        """Waits a moment for what is being read: Ray ends a process that still reads when it is shut down with a crash."""
        with self._lock:
            self._closed, reading = True, list(self._training.values())
        wait(reading, timeout=CLOSING_SECONDS)

    def all_training_rows(self, *, base_prompts: bool = False) -> TrainingRows:
        """Returns the training rows of all tasks at once, for multi-task training; `data.cache` applies to all of them.

        With `base_prompts` those of the base are among them, with their answers; StreamError where the stream has none.
        """
        parts = {}
        for task in self._config.stream.tasks:
            assert task.train is not None
            parts[task.name] = task.train.model_copy(update={"cache": None}), task.prompt
        if base_prompts:
            source = self._config.stream.base_prompts
            if source is None:
                raise StreamError("stream.base_prompts: there are none to learn from; name a source with answers")
            parts[BASE_PROMPTS] = source, BASE_PROMPT
        self._make_room_for_features()
        return self._prepare(parts, "train", answer=True).training_rows(list(parts))

    def replayed_rows(self, task: TaskConfig, earlier: Sequence[TaskConfig], share: float, seed: int) -> TrainingRows:
        """Returns a task's training rows and a random share of those of `earlier` tasks; `data.cache` applies to all."""
        self._make_room_for_features()
        mixed = []
        for each in (*earlier, task):
            assert each.train is not None
            source = each.train.model_copy(update={"cache": None})
            rows = self._prepare({each.name: (source, each.prompt)}, "train", answer=True).training_rows([each.name])
            mixed.append((rows, 1.0 if each is task else share))
        return mixture(mixed, seed)

    @cached_property
    def base_prompts(self) -> PreparedData:
        """The base prompts, as `BASE_PROMPTS`."""
        return self.prompts([BASE_PROMPTS])

    def prompts(self, names: Sequence[str]) -> PreparedData:
        """Reads the evaluation prompts of these tasks and benchmarks, or the base prompts, as `BASE_PROMPTS`."""
        parts: dict[str, tuple[SourceConfig, str]] = {}
        for name in names:
            task = self.eval_tasks.get(name)
            if task is not None:
                parts[name] = self._limited(task.eval), task.prompt
            elif self._config.stream.base_prompts is not None:
                parts[name] = self._config.stream.base_prompts, BASE_PROMPT
        whose = f"{len(parts)} tasks and benchmarks" if len(parts) > 1 else " ".join(parts)
        what = "the base prompts" if list(parts) == [BASE_PROMPTS] else f"the prompts of {whose}"
        with self._progress.working(f"reading {what}"):
            prepared = self._prepare(parts, "eval", answer=False)
        for name in parts:
            self.tell_set_aside(name, prepared.aside[name], "eval")
        return prepared

    def eval_task(self, name: str) -> EvalTask:
        """Returns a task or benchmark with the prompts that it is evaluated on."""
        task = self.eval_tasks[name]
        return EvalTask(task, self._task_rows(self._limited(task.eval), task.prompt, answer=False, metric=task.metric))

    def tell_set_aside(self, name: str, aside: SetAside, split: str) -> None:
        """Shows how many rows of a task (`split` train or eval) were set aside, if any, and in which file."""
        if aside:
            self._progress.log(f"  {name}: {aside}: {self._shown(self.quarantine)}/{split}/{name}.jsonl")

    def _begin_to_read(self, task: TaskConfig) -> None:
        assert task.train is not None
        parts = {task.name: (task.train, task.prompt)}
        read = partial(self._prepare, parts, "train", answer=True)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{task.name}: the run has ended")
            if task.name not in self._training:
                self._training[task.name] = begin(read, name=f"reading {task.name}")

    def _make_room_for_features(self) -> None:
        if not self.vision and not self._capacity.side_by_side:
            self._make_room()

    def _limited(self, source: SourceConfig) -> SourceConfig:
        limit = self._config.evaluation.limit
        return source.model_copy(update={"limit": min(limit, source.limit or limit)}) if limit else source

    def _task_rows(self, source: SourceConfig, prompt: str, *, answer: bool, metric: str | None) -> TaskRows:
        key = self._identity.encoded_rows(source, prompt, answer=answer, metric=metric)
        return TaskRows(source, prompt, key=key, metric=metric)

    def _prepare(self, sources: Mapping[str, tuple[SourceConfig, str]], split: str, *, answer: bool) -> PreparedData:
        parts = {}
        for name, (source, prompt) in sources.items():
            metric = self.eval_tasks[name].metric if name in self.eval_tasks and not answer else None
            parts[name] = self._task_rows(source, prompt, answer=answer, metric=metric)
        # One set of workers computes the image features of rows to be learned, whoever asks.
        with self._encoding if answer and not self.vision else nullcontext():
            return prepare(
                parts,
                self._config.data,
                base=self._config.base,
                data_folder=self.demo_folder,
                quarantine=self.quarantine / split,
                answer=answer,
                embeds_folder=self.features,
                workers=self._capacity.inference,
            )
