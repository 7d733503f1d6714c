"""Typed, frozen configurations: YAML in, dotted overrides on top, errors that name file, field and remedy.

Every field says what it is, its unit and why its default is what it is; the same sentences are what `--help` and error
messages show.
"""

from pipeline.config.adding import AddConfig
from pipeline.config.addresses import address_fault, is_address, output_place
from pipeline.config.core import Config, ConfigError, digest, holds_secrets, without_secrets
from pipeline.config.learning import (
    BaseModelConfig,
    EvaluationConfig,
    ExpertConfig,
    InferenceConfig,
    LearnConfig,
    PlacementStrategy,
    RegistryConfig,
    RouterConfig,
    TrainingConfig,
)
from pipeline.config.loading import fields_of, load_config, read_values
from pipeline.config.paths import with_paths
from pipeline.config.prediction import PredictConfig
from pipeline.config.tasks import (
    ColumnsConfig,
    DataConfig,
    ReadingConfig,
    Source,
    SourceConfig,
    StreamConfig,
    TaskConfig,
)

__all__ = [
    "AddConfig",
    "BaseModelConfig",
    "ColumnsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ExpertConfig",
    "InferenceConfig",
    "LearnConfig",
    "PlacementStrategy",
    "PredictConfig",
    "RegistryConfig",
    "ReadingConfig",
    "RouterConfig",
    "Source",
    "SourceConfig",
    "StreamConfig",
    "TaskConfig",
    "TrainingConfig",
    "address_fault",
    "digest",
    "fields_of",
    "load_config",
    "read_values",
    "holds_secrets",
    "is_address",
    "output_place",
    "with_paths",
    "without_secrets",
]
