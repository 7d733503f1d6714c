"""Typed, frozen configurations: YAML in, dotted overrides on top, errors that name file, field and remedy.

Every field says what it is, its unit and why its default is what it is; the same sentences are what `--help` and error
messages show.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A mistake in a configuration file or an override; the message names file, field and remedy."""


class Config(BaseModel):
    """A frozen group of settings; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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


class SourceConfig(Config):
    """Where rows come from. A plain string in YAML is a path."""

    path: str
    """File, folder, glob or URI (s3://, gs://) of parquet, jsonl, json, tsv or csv files, compressed or not;
    `embedded://<task>/<train|eval>` for the data that ship here."""
    format: Literal["auto", "parquet", "jsonl", "json", "tsv", "csv"] = "auto"
    """File format; `auto` goes by the files' endings. `json` is one array of rows, as LLaVA's; in a folder `auto` takes json
    files only where there is nothing else, since they often describe the other files."""
    layout: Literal["chartqa", "docvqa", "mmbench"] | None = None
    """Published layout of the files, instead of `columns`. `mmbench` writes the options under the question and asks each
    question once for every rotation of its options."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names, where they differ from the canonical ones."""
    image_root: str | None = None
    """Folder or URI that image paths count from, and must lie in; default: the folder of the file that names them."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, the first in order of the files' names; of `mmbench` whole questions, at least one."""

    @model_validator(mode="after")
    def _a_layout_has_its_columns(self) -> "SourceConfig":
        if self.layout is not None and self.columns != ColumnsConfig():
            raise ValueError(f"layout {self.layout!r} names the columns itself; give either `layout` or `columns`")
        return self


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(_as_source)]


class TaskConfig(Config):
    """One task of the stream, or one foundation benchmark (then without `train`)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")
    """Name of the task and of its expert: lower-case letters, digits, underscores."""
    train: Source | None = None
    """Rows to learn from."""
    eval: Source
    """Held-out rows; never seen in training."""
    prompt: str = "{question}"
    """Template around the text of the first user message; `{question}` is that text."""
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

    tasks: tuple[TaskConfig, ...]
    """New tasks, in the order in which they are learned."""
    foundation: tuple[TaskConfig, ...] = ()
    """Benchmarks of what the base can already do; evaluated after every task, never trained on."""
    general: Source | None = None
    """Small sample of general prompts; its statistics are the null expert. Without it the router abstains by distance."""

    @model_validator(mode="after")
    def _tasks_are_distinct(self) -> "StreamConfig":
        names = [task.name for task in (*self.tasks, *self.foundation)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"task names must differ; twice: {', '.join(sorted(twice))}")
        for task in self.tasks:
            if task.train is None:
                raise ValueError(f"task {task.name!r} has no `train` source; only foundation benchmarks go without")
        return self


def _off(value: Any) -> Any:
    return "off" if value is False else value  # how YAML reads the word


class DataConfig(Config):
    """How rows are read, checked and encoded."""

    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Share of bad rows above which a task fails; below it they are set aside in a quarantine file."""
    max_tokens: int = Field(default=4096, ge=16)
    """Longest row in tokens, image tokens included; longer rows are set aside, never cut."""
    max_pixels: int = Field(default=200_000_000, ge=1)
    """Largest image in pixels; larger ones (decompression bombs) are set aside unread. A 10,000 x 10,000 scan fits."""
    readers: int = Field(default=2, ge=1)
    """Parallel preprocessing tasks, one CPU each; about one a core, fewer where training computes on the same cores."""
    cache: Literal["auto", "memory", "none"] = "auto"
    """Keep preprocessed rows in Ray's object store over the epochs; `auto` does if they fit into a quarter of it."""
    vision_cache: Annotated[Literal["off", "features"], BeforeValidator(_off)] = "off"
    """`features`: the frozen vision tower sees every image once; what it says of it is kept on disk and read by all
    epochs, stages and evaluations. Pays from the second time that a row is read."""
    by_length: bool = False
    """Batches of rows of similar length: less padding where lengths differ much."""


def _here(path: str) -> str:
    """Makes the path of something that is here absolute: workers run in other folders."""
    found = Path(path).expanduser()
    return str(found.absolute()) if path != "tiny" and found.exists() else path


class BaseModelConfig(Config):
    """The frozen vision-language model."""

    path: Annotated[str, AfterValidator(_here)] = "tiny"
    """Checkpoint folder, hub id, URI (s3://, gs://) or GGUF file; `tiny` is the base that ships with the project."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Name in the registry; default: the last part of `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen weights; bfloat16 on GPUs (slow on CPUs)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; `flash_attention_2` needs the package flash-attn and a GPU."""
    max_tiles: int | None = Field(default=None, ge=1)
    """Most tiles an image is cut into; default: what the base's processor says (12 for InternVL). Fewer tiles, fewer
    tokens; for bases that tile."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint. Off: only transformers' own classes."""

    @property
    def label(self) -> str:
        """The base's name in the registry."""
        return self.name or Path(self.path).name.removesuffix(".gguf")


class ExpertConfig(Config):
    """Expert stage: one LoRA on every Linear of the language model."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Rank r of the update; 8 suffices at width 128, InternVL's own recipe takes 16."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA's alpha, the update is scaled by alpha / r; default 2 r, as InternVL's recipe."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str = "auto"
    """Regular expression that the full path of a Linear must match; `auto`: every Linear in the language model's layers,
    by the base's family."""
    steps: int = Field(default=250, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Rows a step, over all workers."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate (AdamW, cosine); 2e-3 suits the tiny base, 4e-5 InternVL-2."""
    warm_up: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps with a rising learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""

    @property
    def lora_alpha(self) -> float:
        """The alpha in force."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class RouterConfig(Config):
    """Router stage and routing."""

    kind: Literal["prompt", "token", "two_level"] = "prompt"
    """Who chooses: `prompt`, one closed-form decision a prompt (the one that measures best); `token`, every Linear for
    itself; `two_level`, the prompt short-lists experts and the Linears weigh them."""
    token_scores: Literal["evidence", "published"] = "evidence"
    """token: by what a Linear chooses: `evidence`, what its input says about the whole prompt, from statistics; or, as
    `published`, for every token by the trained routing vectors."""
    top_k: int = Field(default=2, ge=1)
    """token: experts mixed at each Linear (`published`: at each token of it); PHATGOOSE takes 2."""
    short_list: int = Field(default=3, ge=1)
    """two_level: places on a prompt's short list, the base among those who may stand on it."""
    temperature: float = Field(default=1.0, gt=0)
    """token, two_level: divides the scores before the softmax."""
    steps: int = Field(default=25, ge=1)
    """Steps of the router stage, a tenth of the expert stage's."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Learning rate of the routing vectors (AdamW, constant)."""
    feature_width: int | None = Field(default=None, ge=8)
    """prompt: project features to this width (one fixed seeded projection) where three times the base's width is too much."""
    shrinkage: float = Field(default=0.05, gt=0, lt=1)
    """prompt: weight of the identity in the standardised covariance."""
    quantile: float = Field(default=0.99, gt=0.5, lt=1)
    """prompt: without a general sample, prompts farther from every task than this quantile of its own go to the base."""


class TrainingConfig(Config):
    """How a task's run uses the machine."""

    workers: int = Field(default=1, ge=1)
    """Ray Train workers (one GPU each, if `gpu`)."""
    gpu: bool = False
    """Give every worker a GPU."""
    threads: int = Field(default=2, ge=1)
    """CPUs of each worker and threads of torch in it; two workers on two cores take 1."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 shards what LoRA training adds (optimizer states) and costs no extra
    communication; 3 also shards the frozen base, for bases that do not fit on one GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations and gradients. With bf16 DeepSpeed's optimizer keeps the trained weights in fp32 and
    works on those; a prompt's statistics are summed in fp64 either way."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows of one forward pass of one worker; default: the whole of its share. Smaller ones are accumulated to
    `expert.batch_size`: less memory, the same step."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations twice instead of keeping them: about half as much time again behind a
    frozen base, far less memory."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in CPU memory: optimizer states (ZeRO 1 to 3), or with `all` the sharded base too (ZeRO 3)."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints (adapter, its optimizer state, position in the data; never the base)."""
    max_failures: int = Field(default=2, ge=0)
    """How often a task restarts from its last checkpoint when a worker dies."""
    explosion: float = Field(default=20.0, gt=1)
    """Stop the task when the loss exceeds this multiple of its first value (or is not finite)."""


class EvaluationConfig(Config):
    """Evaluation after every task."""

    batch_size: int = Field(default=64, ge=1)
    """Prompts a batch."""
    max_new_tokens: int = Field(default=12, ge=1)
    """Longest answer in tokens."""
    workers: int = Field(default=1, ge=1)
    """Parallel evaluators, one GPU each if training has GPUs."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many prompts a task."""


class RegistryConfig(Config):
    """MLflow tracking and model registry."""

    uri: str | None = None
    """Tracking server, e.g. http://mlflow:5000; default: SQLite file `mlflow.db` beside the output folder."""
    experiment: str = "pointsman"
    """MLflow experiment."""


class LearnConfig(Config):
    """Everything that `pointsman learn` needs; one YAML file."""

    name: str = Field(default="demo", pattern=r"^[A-Za-z0-9_-]+$")
    """Name of the run; its folder is `<output>/<name>`."""
    output: str = "runs"
    """Folder for results, checkpoints and, by default, MLflow's database; shared storage on a cluster."""
    seed: int = 0
    """Seed of weights, data order and projections."""
    base: BaseModelConfig = BaseModelConfig()
    stream: StreamConfig
    data: DataConfig = DataConfig()
    expert: ExpertConfig = ExpertConfig()
    router: RouterConfig = RouterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()

    @property
    def folder(self) -> Path:
        """Absolute folder of this run (workers run elsewhere, so relative paths would not do)."""
        return Path(self.output).resolve() / self.name

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.registry.uri or f"sqlite:///{Path(self.output).resolve() / 'mlflow.db'}"


C = TypeVar("C", bound=Config)


def load_config(path: str | Path, overrides: Sequence[str], kind: type[C]) -> C:
    """Reads a YAML file into `kind` and lays `field.sub=value` overrides on top (values are YAML).

    Raises ConfigError naming file, field and remedy.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of fields, found {type(values).__name__}")
    for override in overrides:
        _override(values, override, kind)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, kind, e) for e in error.errors())) from None


def _override(values: dict[str, Any], override: str, kind: type[Config]) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: write it as field.sub=value, e.g. expert.rank=16")
    *path, last = key.strip().split(".")
    place = values
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {part!r} is not a group of fields")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not valid YAML: {error}") from None


def _explain(path: Path, kind: type[Config], error: Any) -> str:
    """One readable line for a pydantic error: where, what, and what would be right."""
    place = ".".join(str(part) for part in error["loc"]) or "(file)"
    key = ".".join(part for part in error["loc"] if isinstance(part, str))  # without the numbers of tasks
    fields = dict(fields_of(kind, everywhere=True))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else "`pointsman learn --help` lists the fields"
        return f"{path}: {place}: no such field; {hint}"
    field = fields.get(key)
    meaning = f"\n    {place}: {field.description}" if field is not None and field.description else ""
    given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
    return f"{path}: {place}: {error['msg']}{given}{meaning}"


def fields_of(kind: type[Config], prefix: str = "", *, everywhere: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, pydantic field) of a configuration class, depth first.

    With `everywhere` also the fields of optional groups and of the groups in lists, e.g. `stream.tasks.name`.
    """
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}", field
        group = _group(field.annotation) if everywhere else field.annotation
        if isinstance(group, type) and issubclass(group, Config):
            yield from fields_of(group, f"{prefix}{name}.", everywhere=everywhere)


def _group(annotation: Any) -> type[Config] | None:
    """Returns the group inside an annotation such as `tuple[TaskConfig, ...]` or `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((group for part in get_args(annotation) if (group := _group(part))), None)


def without_secrets(path: str) -> str:
    """Returns a path without the keys that a URI may hold."""
    return re.sub(r"://[^/@]*@", "://", path.split("?", 1)[0] if "://" in path else path)


def digest(*parts: Any) -> str:
    """Returns 12 hex digits that name what was computed from `parts` (configs or JSON-able values)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]
