"""Settings of adding one task to a registered pool; whatever is left out is taken from the pool and its newest expert."""

from typing import Annotated

from pydantic import AfterValidator, model_validator

from pipeline.config.addresses import output_place
from pipeline.config.core import RUN_NAME, Config
from pipeline.config.learning import (
    BaseModelConfig,
    EvaluationConfig,
    ExpertConfig,
    RegistryConfig,
    RouterConfig,
    TrainingConfig,
    no_shared_folder,
)
from pipeline.config.tasks import DataConfig, TaskConfig

OF_TRAINING = {"steps", "learning_rate"}
"""Router settings that concern one expert; all others are the pool's."""


class AddConfig(Config):
    """All settings of `pointsman add`; one YAML file. Only `task` is needed.

    `base`, `expert`, `data.group_by_length` and `seed` are those of the pool's newest expert where they are not given,
    `router` is the pool's.
    """

    COMMAND = "add"

    task: TaskConfig
    """The task to learn."""
    benchmarks: tuple[TaskConfig, ...] = ()
    """Benchmarks of the base's abilities, evaluated anew; without them, those that the registry remembers are looked at."""
    name: Annotated[str, RUN_NAME, AfterValidator(no_shared_folder)] | None = None
    """Name of the run; its folder is `<output>/<name>`. Default: <pool>-<task>."""
    output: Annotated[str, AfterValidator(output_place)] = "runs"
    """Folder for results and checkpoints, or an address (s3://bucket/runs). On a cluster whose nodes share no file system: an
    address."""
    seed: int | None = None
    """Seed of weights, data order and projections."""
    base: BaseModelConfig = BaseModelConfig()
    """How the base is loaded; `base.path` where it lies, if the registry's copy is not to be used."""
    data: DataConfig = DataConfig()
    expert: ExpertConfig = ExpertConfig()
    router: RouterConfig = RouterConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _is_a_task_to_learn(self) -> "AddConfig":
        if self.task.train is None:
            raise ValueError(f"task {self.task.name!r} has no `train` source; there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _the_pools_own_settings_stay(self) -> "AddConfig":
        if others := sorted(self.router.model_fields_set - OF_TRAINING):
            raise ValueError(
                f"router.{others[0]} is the pool's, and the same for all of its experts; leave it out (of the router, only "
                f"{' and '.join(sorted(OF_TRAINING))} concern a new expert)"
            )
        if self.registry.pool is not None:
            raise ValueError("registry.pool: the pool is what --pool names; leave it out")
        return self
