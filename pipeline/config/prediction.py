"""Settings of answering rows in bulk (`pointsman predict`)."""

from pydantic import Field, model_validator

from pipeline.config.core import Config
from pipeline.config.learning import BaseModelConfig, InferenceConfig
from pipeline.config.tasks import Questions, ReadingConfig


class AnsweringConfig(InferenceConfig):
    """Answering, and the hardware for it."""

    ALIASES = {"num_workers": "workers", "use_gpu": "gpu"}

    gpu: bool = False
    """Give every worker `gpus_per_worker` GPUs."""
    cpus_per_worker: int = Field(default=2, ge=1)
    """CPUs per worker, and threads of torch in it."""


class PredictConfig(Config):
    """All settings of `pointsman predict`; the command line names `source.path`."""

    COMMAND = "predict"

    source: Questions
    """The rows. They need no answers: of `columns`, `question` may stand alone, a conversation may end with the user, and an
    answer that is there is left out."""
    prompt: str = "{question}"
    """Template around the text of the first user message; `{question}` is that text."""
    told: str | None = None
    """Oracle routing: an expert of the pool or `base`, which answers all rows, or the column that names it for each."""
    base: BaseModelConfig | None = None
    """The base of a pool's folder. Of a registered pool the registry says it; dtype, attention and max_tiles may differ."""
    data: ReadingConfig = ReadingConfig()
    evaluation: AnsweringConfig = AnsweringConfig()
    rows_per_part: int = Field(default=1024, ge=1)
    """Rows of one file of answers; a command that was stopped goes on after the last file."""

    @model_validator(mode="after")
    def _fits_prediction(self) -> "PredictConfig":
        if "{question}" not in self.prompt:
            raise ValueError("prompt: the template must contain {question}")
        return self
