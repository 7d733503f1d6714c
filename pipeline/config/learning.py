"""Settings of learning: base, both stages, hardware, evaluation and registry; `LearnConfig` holds all of them."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from pipeline.config.addresses import is_address, output_place, working_folder
from pipeline.config.core import RUN_NAME, Config, spelled, without_secrets
from pipeline.config.tasks import DataConfig, StreamConfig


def _here(path: str) -> str:
    """Makes a local path absolute: workers run in other folders."""
    found = Path(path).expanduser()
    return str(found.absolute()) if path != "tiny" and found.exists() else path


PlacementStrategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


SHARED_FOLDERS = ("data", "experts")
"""Folders below `output` that belong to no single run: rows and answers, and the experts that pools refer to."""


def no_shared_folder(name: str) -> str:
    """Refuses the name of a folder that belongs to no single run."""
    if name in SHARED_FOLDERS:
        raise ValueError(f"<output>/{name} is what all runs of an output folder share; choose another name")
    return name


def _a_pattern(text: str) -> str:
    """Refuses a text that is no regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def _a_number_or_auto(value: int | str) -> int | str:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError("a number from 1 on, or `auto`")
    return value


class BaseModelConfig(Config):
    """The frozen vision-language model."""

    ALIASES = {"attn_implementation": "attention"}
    PATHS = frozenset({"path"})

    path: Annotated[str, AfterValidator(_here)] = "tiny"
    """Checkpoint folder, hub id, URI (s3://, gs://) or GGUF file; `tiny` is the base that ships with the project."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    name: Annotated[str, spelled("[A-Za-z0-9_.-]+", "use letters, digits, `_`, `.` and `-` only")] | None = None
    """Name in the registry; default: the last part of `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen weights; bfloat16 is for GPUs and slow on CPUs."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation; `flash_attention_2` needs the package flash-attn and a GPU."""
    max_tiles: int | None = Field(default=None, ge=1)
    """Maximum number of tiles per image, for bases that tile; default: the base's own (12 for InternVL). Fewer tiles are fewer
    tokens."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a checkpoint. Off: only classes of transformers are used."""

    @model_validator(mode="after")
    def _has_a_label(self) -> "BaseModelConfig":
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.label) or {"expert", "pool"} & set(self.label.split(".")[1:]):
            raise ValueError(f"{self.label!r} cannot be the base's name in the registry; set base.name")
        return self

    @property
    def label(self) -> str:
        """The base's name in the registry."""
        last = Path(without_secrets(self.path).partition("?")[0]).name.removesuffix(".gguf")
        return self.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", last)


class ExpertConfig(Config):
    """Expert stage: one LoRA on every Linear of the language model."""

    ALIASES = {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "max_steps": "steps",
    }
    FORMER_NAMES = {"warmup_ratio": "warm_up", "max_grad_norm": "clip"}

    rank: int = Field(default=8, ge=1, le=1024)
    """LoRA rank r; 8 suffices at width 128, InternVL's own recipe uses 16."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha: the update is scaled by alpha / r. Default: 2 r, as in InternVL's recipe."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Annotated[str, AfterValidator(_a_pattern)] = "auto"
    """Regular expression that must match the full path of a Linear. `auto`: every Linear in the language model's layers."""
    steps: int = Field(default=250, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per optimizer step, over all workers."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak learning rate (AdamW, cosine); 2e-3 suits the tiny base, 4e-5 InternVL-2."""
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    validate_every: int = Field(default=50, ge=1)
    """Steps between two validations, for tasks with `validation`."""
    patience: int | None = Field(default=None, ge=1)
    """For tasks with `validation`: training stops after so many validations without a new best. Default: it takes all steps.
    The learning-rate schedule is that of all steps either way."""

    @property
    def lora_alpha(self) -> float:
        """The alpha in force."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class RouterConfig(Config):
    """Router stage and routing. Of a learned pool, all but the router stage's settings can be changed without training."""

    FORMER_NAMES = {"candidates": "short_list"}
    FORMER_VALUES = {"token_scores": {"gaussian": "evidence", "phatgoose": "published"}}

    kind: Literal["prompt", "token", "two_level"] = "prompt"
    """Router: `prompt`, one closed-form decision per prompt (the most accurate here); `token`, one decision per Linear;
    `two_level`, the prompt selects candidates and the Linears weight them."""
    token_scores: Literal["gaussian", "phatgoose"] = "gaussian"
    """token: the scores by which a Linear chooses: `gaussian`, the log-likelihood of its inputs over the whole prompt, from
    statistics; `phatgoose`, for every token by the trained routing vectors, as the paper describes it."""
    top_k: int = Field(default=2, ge=1)
    """token: experts mixed at each Linear (`phatgoose`: at each token of it); PHATGOOSE takes 2."""
    candidates: int = Field(default=3, ge=1)
    """two_level: candidates per prompt; the base can be one of them."""
    temperature: float = Field(default=1.0, gt=0)
    """token, two_level: the scores are divided by it before the softmax. `prompt` has no use for it: its posteriors are
    calibrated as they are (the report's calibration error)."""
    steps: int = Field(default=25, ge=1)
    """Optimizer steps of the router stage; a tenth of the expert stage's are enough."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Learning rate of the routing vectors (AdamW, constant)."""
    feature_width: int | None = Field(default=None, ge=8)
    """prompt: width to which prompt features are projected (one fixed seeded projection); default: at most 512. Statistics take
    its square in memory. `pointsman recompute-statistics` gives a learned pool another width."""
    shrinkage: float = Field(default=0.05, gt=0, lt=1)
    """prompt: weight of the identity matrix in the standardised covariance."""
    statistics_rows: int = Field(default=4096, ge=4)
    """Maximum number of distinct prompts per task in its statistics, read in one pass; 4096 are eight per feature of 512."""
    null_components: int = Field(default=12, ge=1)
    """prompt: number of Gaussians that describe the base prompts (k-means with a fixed seed). One is too coarse where tasks
    resemble base abilities."""
    quantile: float = Field(default=0.99, gt=0.5, lt=1)
    """prompt, without base prompts: the out-of-distribution threshold of a task is this quantile of its own prompts' distances;
    prompts beyond the thresholds of all tasks go to the base."""


class TrainingConfig(Config):
    """How a task's training uses the machine."""

    ALIASES = {
        "num_workers": "workers",
        "use_gpu": "gpu",
        "per_device_train_batch_size": "micro_batch",
        "save_steps": "checkpoint_every",
    }
    FORMER_NAMES = {"cpus_per_worker": "threads", "divergence_factor": "explosion"}

    workers: int = Field(default=1, ge=1)
    """Ray Train workers (one GPU each, if `gpu`)."""
    gpu: bool = False
    """Give every worker a GPU."""
    cpus_per_worker: int = Field(default=2, ge=1)
    """CPUs per worker, and threads of torch in it; two workers on two cores take 1."""
    accelerator_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    """Ray's name of the GPU that every worker gets, e.g. A100 or L4, on clusters with several kinds. An autoscaler adds only
    nodes that declare it among their resources, as `accelerator_type:A100: 1`."""
    label_selector: dict[str, str] = {}
    """Labels of the nodes that workers may lie on, as Ray writes them: `{ray.io/market-type: "!spot", zone: "in(a,b)"}`."""
    placement_strategy: PlacementStrategy = "PACK"
    """How Ray places the workers of a task: PACK on few nodes and SPREAD on many, as far as possible; STRICT_PACK on one node,
    STRICT_SPREAD each on another."""
    node_wait_seconds: float = Field(default=900.0, ge=0)
    """Seconds for which a job waits, before it starts, for nodes that the cluster's autoscaler may add."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 shards the optimizer states, without extra communication; 3 also shards the frozen base, for
    bases that do not fit on one GPU."""
    zero_persistence_threshold: int | None = Field(default=None, ge=0)
    """zero_stage=3: weights with at most so many values are not sharded; default: DeepSpeed's 100,000, since small weights cost
    more to gather than to hold. 0 shards all of them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations and gradients. With bf16 DeepSpeed's optimizer keeps the trained weights in fp32 and
    works on those; a prompt's statistics are summed in fp64 either way."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows per forward pass of one worker; default: all of its rows. Smaller micro-batches are accumulated to
    `expert.batch_size`: less memory, the same step."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations twice instead of keeping them: far less memory, about half as much time
    again."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in CPU memory: the optimizer states (ZeRO 1 to 3), or with `all` the sharded base too (ZeRO 3)."""
    parallel_tasks: Annotated[int | str, AfterValidator(_a_number_or_auto)] = 1
    """Tasks that are trained at the same time, each by `workers` of its own; `auto`: as many as the cluster has room for beside
    evaluation. Experts and the order of pool versions do not depend on it."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints (adapter, its optimizer state, position in the data; never the base)."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts per task, from its last checkpoint, after a worker has died."""
    divergence_factor: float = Field(default=20.0, gt=1)
    """The task fails when the loss exceeds this multiple of its first value, or is not finite."""

    @model_validator(mode="after")
    def _a_gpu_has_a_type(self) -> "TrainingConfig":
        if self.accelerator_type is not None and not self.gpu:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type} and gpu false; set gpu to true, or leave accelerator_type out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_offloaded_is_sharded(self) -> "TrainingConfig":
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload is all and zero_stage {self.zero_stage}: only ZeRO 3 shards the base, so that it can wait in CPU "
                "memory; set zero_stage to 3, or offload to optimizer"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                "offload is optimizer and zero_stage 0: only ZeRO shards optimizer states, so that they can wait in CPU "
                "memory; set zero_stage to 1, or offload to none"
            )
        return self


class InferenceConfig(Config):
    """How prompts are answered."""

    batch_size: int = Field(default=64, ge=1)
    """Maximum number of prompts per batch."""
    tokens_per_batch: int = Field(default=16384, ge=16)
    """Maximum number of tokens per batch, padding included: long prompts come in smaller batches. 16,384 keep a GPU busy, and
    take 4 of 24 GB beside an 8B base; a longer prompt is a batch of its own."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum length of an answer in tokens."""
    workers: int = Field(default=1, ge=1)
    """Parallel workers, each with the base and the pool."""
    gpus_per_worker: int = Field(default=1, ge=1)
    """GPUs of each worker, if it gets any; 1 unless the base is larger than one GPU. With more, each holds a part of the base's
    layers."""
    expert_memory: ByteSize | None = Field(default=None, gt=0)
    """Maximum memory of the experts' weights on the devices of one worker, or of one process that serves the pool; e.g.
    `2GiB`. Experts that a batch is routed to are read when they are needed and replace those that were used longest ago; a
    batch that needs more at once still gets them. Default: all experts are in memory. Not for router.kind token, where every
    Linear chooses from all experts."""


class EvaluationConfig(InferenceConfig):
    """Inference: evaluation after every task, statistics of base prompts, image features."""

    max_new_tokens: int = Field(default=12, ge=1)
    """Maximum length of an answer in tokens."""
    workers: int = Field(default=1, ge=1)
    """Parallel evaluators with `training.cpus_per_worker` CPUs each; they also read base prompts and compute image features."""
    gpus_per_worker: int = Field(default=1, ge=1)
    """GPUs of each evaluator, if `training.gpu`; 1 unless the base is larger than one GPU. With more, each holds a part of
    the base's layers."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many prompts per task."""
    every: int = Field(default=1, ge=1)
    """router.kind token and two_level: evaluate after every so many tasks, and after the last. Their answers depend on the
    whole pool, so all prompts are answered anew each time. With `prompt`, answers are generated once, and the pool is evaluated
    after every task."""


class RegistryConfig(Config):
    """MLflow tracking and model registry."""

    FORMER_NAMES = {"retry_seconds": "patience"}

    uri: str | None = None
    """Tracking server, e.g. http://mlflow:5000, or database, e.g. postgresql://pointsman@db/mlflow; default: SQLite file
    `mlflow.db` in the output folder."""
    experiment: str = "pointsman"
    """MLflow experiment."""
    artifacts: str | None = None
    """Where a new experiment keeps its artifacts, a folder or an address like s3://bucket/mlflow; the experiment remembers it.
    Default: what a server decides; for a file or a database `mlartifacts` beside the file, or in the output folder."""
    pool: Annotated[str, RUN_NAME] | None = None
    """Name of the pool, whose versions are `<base>.pool.<pool>`; default: the run's name. Streams with the same pool write into
    the same versions."""
    promote: Literal["gate", "manual"] = "gate"
    """Who makes a learned pool the `champion`: the gate, if it has every task of the present champion, none drops by more than
    `tolerance` and 99 % of the base's accuracy on the base abilities is kept; or only `pointsman registry promote`."""
    tolerance: float = Field(default=0.02, ge=0, le=1)
    """How much lower than the champion's a task's accuracy may be for the gate, a difference of accuracies."""
    system_metrics: bool = False
    """Let MLflow record CPU, memory, disk, network and GPUs of the driver's node while a run works (GPUs need the package
    nvidia-ml-py)."""
    retry_seconds: float = Field(default=300.0, ge=0)
    """Seconds for which registering is retried while the registry does not answer. Nothing that is trained is lost if it stays
    away."""


class LearnConfig(Config):
    """All settings of `pointsman learn`; one YAML file."""

    name: Annotated[str, RUN_NAME, AfterValidator(no_shared_folder)] = "demo"
    """Name of the run; its folder is `<output>/<name>`."""
    output: Annotated[str, AfterValidator(output_place)] = "runs"
    """Folder for results, checkpoints and, by default, MLflow's database; or an address: s3://bucket/runs, gs://, or whatever
    pyarrow or fsspec reach. On a cluster whose nodes share no file system: an address. It needs registry.uri, too."""
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

    @model_validator(mode="after")
    def _every_worker_has_rows(self) -> "LearnConfig":
        rows, workers = self.expert.batch_size, self.training.workers
        if rows < workers:
            raise ValueError(
                f"expert.batch_size is {rows} and training.workers {workers}: some workers would have no row in any step; "
                f"raise expert.batch_size to at least {workers}, or lower training.workers"
            )
        return self

    @model_validator(mode="after")
    def _the_registry_lies_on_a_file_system(self) -> "LearnConfig":
        if is_address(self.output) and self.registry.uri is None:
            raise ValueError(
                f"output={without_secrets(self.output)} cannot hold MLflow's database; let registry.uri be a server or a file, "
                "like http://mlflow:5000 or sqlite:////home/me/mlflow.db"
            )
        return self

    def is_evaluated(self, learned: int) -> bool:
        """Whether the pool is evaluated when so many tasks are learned."""
        every = 1 if self.router.kind == "prompt" else self.evaluation.every
        return learned % every == 0 or learned == len(self.stream.tasks)

    @property
    def output_folder(self) -> Path:
        """Absolute folder of results (workers run elsewhere, so relative paths would not do).

        Where `output` is an address, the folder of this machine that holds a copy.
        """
        return working_folder(self.output) if is_address(self.output) else Path(self.output).resolve()

    @property
    def folder(self) -> Path:
        """Absolute folder of this run."""
        return self.output_folder / self.name

    @property
    def pool(self) -> str:
        """Name of the pool in the registry."""
        return self.registry.pool or self.name

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI in force."""
        return self.registry.uri or f"sqlite:///{self.output_folder / 'mlflow.db'}"
