"""Identity of results: digests of everything that they depend on, and of nothing that says how they were computed.

A result is found again by its name, so whatever changes it must be part of the name. Names are built of each other: base and
rows at the bottom, encoded rows, base prompts and experts of both, pools of experts, evaluations of pools.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config import LearnConfig, RouterConfig, SourceConfig, TaskConfig, digest
from pipeline.data.encoded.encoding import PROMPT_COLUMNS
from pipeline.data.sources import reader
from pipeline.models.target_modules import base_linears
from pipeline.routing.foreign import foreign_adapter
from pipeline.routing.serialization import VERSIONS
from pipeline.storage.mirror import Folder

BASE_PROMPT = "{question}"
"""Template around the questions of the base prompts."""

DATA = "data"
"""Key of a task's rows among the parts of its expert's identity."""

CHOOSING = {"kind", "token_scores", "top_k", "candidates", "temperature", "null_components"}
"""Router settings that say how experts are chosen; all others are part of an expert's identity."""

ADAPTER = "adapter"
"""Key of a LoRA that was given among the parts of its expert's identity."""

OF_EXPERT_STAGE = {
    "rank", "alpha", "dropout", "steps", "learning_rate", "warmup_ratio", "weight_decay", "validate_every", "patience",
}  # fmt: skip
"""Settings without effect where the LoRA is given."""

FORMER_MODES = {"oracle": "told", "single": "only"}
"""How modes of evaluation were called when results were first named by them."""

VALIDATED = ("validate_every", "patience")
"""Settings of the expert stage without effect for tasks without `validation`."""

TRAINED = {"router.steps", "router.learning_rate"}
"""Router settings that an expert's training depends on; all others say how statistics are computed."""


def is_of_statistics(part: str) -> bool:
    """Whether a part of an expert's identity concerns its statistics alone, not its training."""
    return part in VERSIONS or (part.startswith("router.") and part not in TRAINED)


@dataclass(frozen=True)
class Identity:
    """Names the results of a configuration; `fingerprint` is that of the base's files."""

    config: LearnConfig
    fingerprint: str
    data_folder: Folder
    """Folder of the demo's data."""
    _fingerprints: dict[SourceConfig, str] = field(default_factory=dict, repr=False, compare=False)
    _adapters: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def base(self) -> str:
        """The frozen model as it is loaded: files, precision, attention kernel (they round differently), its own code."""
        return digest(
            self.fingerprint, self.config.base.to_identity(include={"dtype", "attention", "trust_remote_code"})
        )

    def rows(self, source: SourceConfig, prompt: str) -> str:
        """The rows of a source that are used, with prompt template and image tiling."""
        data = self.config.data.to_identity(include={"max_tokens", "max_pixels"})
        return digest(self._fingerprint(source), prompt, data, self.config.base.max_tiles)

    def _fingerprint(self, source: SourceConfig) -> str:
        """The fingerprint of a source, computed once per session: its files are read once."""
        if source not in self._fingerprints:
            self._fingerprints[source] = reader.fingerprint(source, self.data_folder)
        return self._fingerprints[source]

    def encoded_rows(self, source: SourceConfig, prompt: str, *, answer: bool, metric: str | None) -> str:
        """Rows as this base reads them; rows that `metric` cannot score are set aside."""
        return digest(self.rows(source, prompt), self.base, answer, metric, *([] if answer else [PROMPT_COLUMNS]))

    def scored_rows(self, task: TaskConfig) -> str:
        """The evaluation prompts of a task and how they are scored: accuracies on the same can be compared."""
        return digest(self.rows(task.eval, task.prompt), task.metric, self.config.evaluation.limit)

    def training_rows(self, task: TaskConfig) -> str:
        """The rows that a task's expert learns from."""
        assert task.train is not None, "checked where configurations are read"
        return self.rows(task.train, task.prompt)

    def settings(self, task: TaskConfig) -> dict[str, Any]:
        """Everything but the rows that a task's expert depends on, by name."""
        config, held_out = self.config, bool(task.validation)
        # Settings of validation are parts of experts that are validated; the names of all others are as they were before it.
        unused = set() if held_out else set(VALIDATED)
        unused |= OF_EXPERT_STAGE if task.adapter is not None else set()
        return {
            "task": task.name,
            "base": self.base,
            "seed": config.seed,
            **{f"data.{name}": value for name, value in config.data.to_identity(include={"group_by_length"}).items()},
            **{f"expert.{name}": value for name, value in config.expert.to_identity(exclude=unused).items()},
            **{f"router.{name}": value for name, value in config.router.to_identity(exclude=CHOOSING).items()},
            **({"validation": task.validation} if held_out else {}),
            **VERSIONS,
        }

    def parts(self, task: TaskConfig) -> dict[str, Any]:
        """Everything that a task's expert depends on, by name; kept on its card, to show later what has changed."""
        given = {ADAPTER: self.given_adapter(task.adapter)} if task.adapter is not None else {}
        return self.settings(task) | given | {DATA: self.training_rows(task)}

    def given_adapter(self, folder: str) -> str:
        """The LoRA in somebody's folder: what it computes. Read once per session; raises ForeignAdapterError."""
        if folder not in self._adapters:
            self._adapters[folder] = foreign_adapter(folder, base_linears(self.config.base)).content
        return self._adapters[folder]

    def expert(self, task: TaskConfig) -> str:
        """The expert of a task."""
        return digest(self.parts(task))

    def expert_before(self, task: TaskConfig) -> str:
        """The name of the same expert in earlier releases, which included how it was computed."""
        config = self.config
        router = config.router.to_identity(exclude=CHOOSING)
        machine = config.training.to_identity(include={"workers", "zero_stage", "precision", "micro_batch"})
        rows = self.training_rows(task)
        expert = config.expert.to_identity(exclude=set(VALIDATED))
        kept = (task.name, rows, self.base, config.seed, expert, router, machine, config.data.group_by_length)
        return digest(VERSIONS, *kept)

    @cached_property
    def base_prompts(self) -> str | None:
        """The statistics of the base prompts; None if the stream has none."""
        source, config = self.config.stream.base_prompts, self.config
        if source is None:
            return None
        router = config.router.to_identity(exclude=CHOOSING - {"null_components"} | {"steps", "learning_rate"})
        return digest(VERSIONS, self.rows(source, BASE_PROMPT), self.base, router, config.expert.target_modules)

    def pool(self, experts: Sequence[str], router: RouterConfig) -> str:
        """A pool of experts, given by their names in order of arrival."""
        return digest(self.base, router, list(experts), self.base_prompts)

    @cached_property
    def answers(self) -> str:
        """What answers depend on, beside the prompt and the expert."""
        return digest(self.base, self.config.evaluation.max_new_tokens)

    def evaluation(self, tasks: Sequence[TaskConfig], pool: str, mode: str) -> str:
        """The answers of a pool to the prompts of these tasks, and their scores."""
        prompts_and_metrics = [(task.name, self.rows(task.eval, task.prompt), task.metric) for task in tasks]
        settings = self.config.evaluation.to_identity(include={"limit", "max_new_tokens"})
        return digest(prompts_and_metrics, self.base, pool, FORMER_MODES.get(mode, mode), settings)
