"""What is learned: rows and where they come from, tasks, the stream, and how rows are read."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.core import Config


class ColumnsConfig(Config):
    """Which columns of a file hold what. Rows with `messages` need no mapping; question/answer rows name theirs."""

    id: str = "id"
    """Column of the row's id; rows without one are named by file and number."""
    messages: str = "messages"
    """Column of the conversation, the last message the assistant's: role/content, or LLaVA's from/value; a content is text,
    where `<image>` stands for an image, or a list of parts; all of it may be a JSON string."""
    images: str = "images"
    """Column of the images: encoded bytes, base64, paths, or {bytes, path}; one or a list."""
    question: str | None = None
    """Column of the question, for benchmark files that have no messages."""
    answer: str | None = None
    """Column of the answer (or the list of accepted answers) that goes with `question`; without `question` the task's prompt
    is what is asked, as for captions."""
    choices: str | None = None
    """Column of the options of a multiple-choice question, text by letter, for the metric `mmbench`."""
    group: str | None = None
    """Column of what rows have in common that count as one question, right only if all are; for the metric `mmbench`."""

    @model_validator(mode="after")
    def _questions_have_answers(self) -> "ColumnsConfig":
        if self.question is not None and self.answer is None:
            raise ValueError("`question` without `answer`; name the column of the answers too")
        return self


def _by_its_scheme(path: str) -> str:
    """The demo's data had another scheme in earlier releases."""
    return path.replace("embedded://", "demo://", 1) if path.startswith("embedded://") else path


class SourceConfig(Config):
    """Where rows come from. A plain string in YAML is a path."""

    FORMER_NAMES = {"preset": "layout"}

    path: Annotated[str, AfterValidator(_by_its_scheme)]
    """File, folder, glob or URI (s3://, gs://) of parquet, jsonl, json, tsv or csv files, compressed or not;
    `demo://<task>/<train|eval>` for the demo's data, which ship with the project."""
    format: Literal["auto", "parquet", "jsonl", "json", "tsv", "csv"] = "auto"
    """File format; `auto` goes by the files' endings. `json` is one array of rows, as LLaVA's; in a folder `auto` takes json
    files only where there is nothing else, since they often describe the other files."""
    preset: Literal["chartqa", "docvqa", "mmbench"] | None = None
    """Column names of a benchmark as it is published, instead of `columns`. `mmbench` writes the options under the question
    and asks each question once for every rotation of its options."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names, where they differ from the canonical ones."""
    image_root: str | None = None
    """Folder or URI that image paths count from, and must lie in; default: the folder of the file that names them."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, the first in order of the files' names; of `mmbench` whole questions, at least one."""
    cache: Literal["auto", "memory", "none"] | None = None
    """`data.cache` for this source alone, where its rows are learned; default: what `data.cache` says."""

    @model_validator(mode="after")
    def _a_preset_has_its_columns(self) -> "SourceConfig":
        if self.preset is not None and self.columns != ColumnsConfig():
            raise ValueError(f"preset {self.preset!r} names the columns itself; give either `preset` or `columns`")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]


class TaskConfig(Config):
    """One task of the stream, or one benchmark of base abilities (then without `train`)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")
    """Name of the task and of its expert: lower-case letters, digits, underscores."""
    train: Source | None = None
    """Rows to learn from."""
    eval: Source
    """Held-out rows; never seen in training."""
    prompt: str = "{question}"
    """Template around the text of the first user message; `{question}` is that text."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows (at most 2,048) that are held out, to keep the best of the adapters and to stop early: their
    loss is measured every `expert.validate_every` steps. 0: every row is learned, and the last adapter is the expert."""
    metric: Literal["exact_match", "relaxed_accuracy", "anls", "mmbench", "vqa_accuracy", "token_f1"] = "exact_match"
    """How an answer is scored: exact match, ChartQA's relaxed accuracy (5 %), DocVQA's ANLS, MMBench's option letter (all
    rotations of a question must be right, where the source is circular), VQA's agreement with ten people, token F1."""

    @model_validator(mode="after")
    def _names_are_safe(self) -> "TaskConfig":
        if self.name in {"null", "base", "general", "default"} or self.name in "lora_":
            raise ValueError(f"{self.name!r} is reserved; choose another task name")
        if "{question}" not in self.prompt:
            raise ValueError("the prompt template must contain {question}")
        return self


class StreamConfig(Config):
    """The tasks in order of arrival, and what must not be forgotten meanwhile."""

    FORMER_NAMES = {"benchmarks": "foundation", "base_prompts": "general"}

    tasks: tuple[TaskConfig, ...]
    """New tasks, in the order in which they are learned."""
    benchmarks: tuple[TaskConfig, ...] = ()
    """Benchmarks of the base's abilities; evaluated after every task, never trained on."""
    base_prompts: Source | None = None
    """Prompts that the base should go on answering; their statistics are the null expert. Without them, prompts that are far
    from all tasks go to the base."""
    on_change: Literal["retrain", "keep", "fail"] = "retrain"
    """What to do about a task that was learned from other data or with other settings than it has now: train its expert again
    (the old one stays in the registry), keep the old one in the pool, or stop before anything is trained. What has changed is
    said either way."""

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


class DataConfig(Config):
    """How rows are read, checked and encoded."""

    FORMER_NAMES = {"num_readers": "readers", "group_by_length": "by_length"}

    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of bad rows above which a task fails; below it they are set aside in a quarantine file."""
    max_lost_files: int = Field(default=0, ge=0)
    """Files that cannot be read in full, above which a task fails. None by default: unlike a bad row, nobody
    can tell how much is missing, and mostly a copy broke off that can be made again."""
    max_tokens: int = Field(default=4096, ge=16)
    """Longest row in tokens, image tokens included; longer rows are set aside, never cut."""
    max_pixels: int = Field(default=200_000_000, ge=1)
    """Largest image in pixels; larger ones (decompression bombs) are set aside unread. A 10,000 x 10,000 scan fits."""
    num_readers: int = Field(default=2, ge=1)
    """Parallel preprocessing tasks, one CPU each; about one a core, fewer where training computes on the same cores."""
    cache: Literal["auto", "memory", "none"] = "auto"
    """Keep preprocessed rows in Ray's object store over the epochs; `auto` does if they fit into a quarter of the
    smallest node's, since every node on which a worker trains comes to hold all of them. Rows that do not are read in pieces
    of their files; what cannot be read in pieces (texts, parquet with large row groups) is copied once beside the results."""
    shuffle_rows: int = Field(default=4096, ge=16)
    """Rows that do not fit the cache are shuffled by pieces of their files first (sixteen or more make up this number),
    then row by row among so many; fewer where they are large (256 MB of a file at a time)."""
    vision_cache: Annotated[Literal["off", "features"], BeforeValidator(_off)] = "off"
    """`features`: the frozen vision tower sees every image once; what it says of it is kept on disk and read by all
    epochs, stages and evaluations. Pays from the second time that a row is read."""
    group_by_length: bool = False
    """Steps of rows of similar length: less padding where lengths differ much. For rows in the cache."""
