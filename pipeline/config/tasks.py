"""What is learned: sources of rows, tasks, the stream, and how rows are read."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.core import Config, spelled


class ColumnsConfig(Config):
    """Columns of a file. Rows with `messages` need no mapping; rows with question and answer name their columns."""

    id: str = "id"
    """Column of the row's id; rows without one are named by file and number."""
    messages: str = "messages"
    """Column of the conversation, with the assistant's message last: role/content, or LLaVA's from/value. A content is text, in
    which `<image>` stands for an image, or a list of parts; the conversation can be a JSON string."""
    images: str = "images"
    """Column of the images: encoded bytes, base64, paths, or {bytes, path}; one or a list."""
    question: str | None = None
    """Column of the question, for benchmark files that have no messages."""
    answer: str | None = None
    """Column of the answer, or of the list of accepted answers. Without `question` the task's `prompt` is the question, as for
    captions."""
    choices: str | None = None
    """Column of the options of a multiple-choice question, text by letter, for the metric `mmbench`."""
    group: str | None = None
    """Column whose value is shared by rows that count as one question, correct only if all of them are; for the metric
    `mmbench`."""


def _by_its_scheme(path: str) -> str:
    """The demo's data had another scheme in earlier releases."""
    return path.replace("embedded://", "demo://", 1) if path.startswith("embedded://") else path


class SourceConfig(Config):
    """Where rows come from. A plain string in YAML is a path."""

    FORMER_NAMES = {"preset": "layout"}
    PATHS = frozenset({"path", "image_root"})

    path: Annotated[str, AfterValidator(_by_its_scheme)]
    """File, folder, glob or URI (s3://, gs://) of parquet, jsonl, json, tsv or csv files, compressed or not;
    `demo://<task>/<train|eval>` for the demo's data, which ship with the project."""
    format: Literal["auto", "parquet", "jsonl", "json", "tsv", "csv"] = "auto"
    """File format; `auto` goes by the file extension. `json` is one array of rows, as LLaVA's; in a folder, `auto` takes json
    files only where there are no others, since they often describe the other files."""
    preset: Literal["chartqa", "docvqa", "mmbench"] | None = None
    """Column names of a benchmark as it is published, instead of `columns`. `mmbench` writes the options under the question
    and asks each question once for every rotation of its options."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names, where they differ from the canonical ones."""
    image_root: str | None = None
    """Folder or URI that image paths are relative to, and must lie in; default: the folder of the file that names them."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of rows, the first in order of file names; for `mmbench`, of whole questions, at least one."""
    cache: Literal["auto", "memory", "none"] | None = None
    """`data.cache` for the training rows of this source alone."""

    def to_identity(self, *, include: set[str] | None = None, exclude: set[str] | None = None) -> dict[str, Any]:
        """As of any group; the demo's scheme is the former one."""
        named = super().to_identity(include=include, exclude=exclude)
        if self.path.startswith("demo://") and "path" in named:
            named["path"] = self.path.replace("demo://", "embedded://", 1)
        return named

    @model_validator(mode="after")
    def _a_preset_has_its_columns(self) -> "SourceConfig":
        if self.preset is not None and self.columns != ColumnsConfig():
            raise ValueError(f"preset {self.preset!r} names the columns itself; give either `preset` or `columns`")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _with_answers(source: SourceConfig) -> SourceConfig:
    if source.columns.question is not None and source.columns.answer is None:
        raise ValueError("columns: `question` without `answer`; name the column of the answers too")
    return source


Source = Annotated[SourceConfig, BeforeValidator(_as_source), AfterValidator(_with_answers)]
"""Rows with answers: to learn from, or to score answers by."""
Questions = Annotated[SourceConfig, BeforeValidator(_as_source)]
"""Rows with or without answers."""


class TaskConfig(Config):
    """One task of the stream, or one benchmark of base abilities (then without `train`)."""

    PATHS = frozenset({"adapter"})

    name: Annotated[
        str, spelled("[a-z][a-z0-9_]{0,47}", "use a lower-case letter first, then letters, digits and `_`, 48 at most")
    ]
    """Name of the task and of its expert: lower-case letters, digits, underscores."""
    train: Source | None = None
    """Rows to learn from; benchmarks have none."""
    eval: Source
    """Held-out rows; never seen in training."""
    prompt: str = "{question}"
    """Template around the text of the first user message; `{question}` is that text."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows (at most 2,048) that is held out for validation every `expert.validate_every` steps: the best
    adapter becomes the expert, and training can stop early. 0: every row is learned, and the last adapter is the expert."""
    adapter: str | None = None
    """Folder of a PEFT LoRA that somebody has trained for this task on this base: it becomes the expert as it is, and only its
    routing vectors and statistics come from `train`, for which a few hundred rows are enough."""
    metric: Literal["exact_match", "relaxed_accuracy", "anls", "mmbench", "vqa_accuracy", "token_f1"] = "exact_match"
    """Metric: exact match, ChartQA's relaxed accuracy (5 %), DocVQA's ANLS, MMBench's option letter (all rotations of a
    question must be correct, where the source is circular), VQA's agreement with ten people, token F1."""

    @model_validator(mode="after")
    def _names_are_safe(self) -> "TaskConfig":
        # PEFT looks for `lora_` in names of parameters, of which a letter of it would be a part.
        if self.name in {"null", "base", "general", "base_prompts", "default"} or self.name in "lora_":
            raise ValueError(f"{self.name!r} is reserved; choose another task name")
        if self.name == "latest" or re.fullmatch(r"v\d+", self.name):
            raise ValueError(f"{self.name!r} is a word of the model registry for a version; choose another task name")
        if "{question}" not in self.prompt:
            raise ValueError("the prompt template must contain {question}")
        return self

    @model_validator(mode="after")
    def _what_is_given_is_not_trained(self) -> "TaskConfig":
        if self.adapter is not None and self.validation:
            raise ValueError("`adapter` is given, so there is nothing to validate; leave `validation` out")
        return self


class StreamConfig(Config):
    """The tasks in order of arrival, and the base abilities that must be retained."""

    FORMER_NAMES = {"benchmarks": "foundation", "base_prompts": "general"}

    tasks: tuple[TaskConfig, ...]
    """New tasks, in the order in which they are learned."""
    benchmarks: tuple[TaskConfig, ...] = ()
    """Benchmarks of the base's abilities; evaluated after every task, never trained on."""
    base_prompts: Source | None = None
    """Prompts that the base should go on answering; their statistics are the null expert. Without them, prompts that are far
    from all tasks go to the base."""
    on_change: Literal["retrain", "keep", "fail"] = "retrain"
    """What happens to a task whose data or settings have changed since it was learned: its expert is trained again (the old one
    stays in the registry), the old one is kept in the pool, or the run fails before anything is trained. The changes are shown
    either way."""

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> "StreamConfig":
        if not self.tasks:
            raise ValueError("`tasks` is empty, so there is nothing to learn; name at least one task")
        names = [task.name for task in (*self.tasks, *self.benchmarks)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"task names must differ; twice: {', '.join(sorted(twice))}")
        for task in self.tasks:
            if task.train is None:
                raise ValueError(f"task {task.name!r} has no `train` source; only benchmarks go without")
        return self


def _off(value: Any) -> Any:
    return "off" if value is False else value  # how YAML reads the word


class ReadingConfig(Config):
    """How rows are read, checked and encoded."""

    FORMER_NAMES = {"num_readers": "readers"}

    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of bad rows above which a task fails; up to it they are set aside in a quarantine file."""
    max_lost_files: int = Field(default=0, ge=0)
    """Number of incompletely readable files above which a task fails. Default 0: how much is missing is unknown, and mostly a
    copy was interrupted that can be made again."""
    max_tokens: int = Field(default=4096, ge=16)
    """Maximum length of a row in tokens, image tokens included; longer rows are set aside, never truncated."""
    max_pixels: int = Field(default=200_000_000, ge=1)
    """Maximum size of an image in pixels; larger ones (decompression bombs) are set aside unread. A 10,000 x 10,000 scan
    fits."""
    num_readers: int = Field(default=2, ge=1)
    """Parallel preprocessing tasks, one CPU each; about one per core, fewer where training computes on the same cores."""


class DataConfig(ReadingConfig):
    """How rows are read, checked and encoded, and read again."""

    FORMER_NAMES = ReadingConfig.FORMER_NAMES | {"group_by_length": "by_length"}

    cache: Literal["auto", "memory", "none"] = "auto"
    """Keep preprocessed rows in Ray's object store over the epochs. `auto`: if they fit into a quarter of the smallest node's
    store, since every node that trains comes to hold all of them. Other rows are streamed from their files; text files and
    parquet files with large row groups are first copied below `output`, once."""
    shuffle_rows: int = Field(default=4096, ge=16)
    """Rows among which streamed rows are shuffled; at most 256 MB of a file at a time. Pieces of the files (sixteen or more per
    such window) are shuffled first."""
    vision_cache: Annotated[Literal["off", "features"], BeforeValidator(_off)] = "off"
    """`features`: the frozen vision tower encodes every image once; its embeddings are kept on disk and read in all epochs,
    stages and evaluations. Worth it from the second time that a row is read."""
    group_by_length: bool = False
    """Batches of rows of similar length: less padding where lengths differ much. For rows in the cache."""
