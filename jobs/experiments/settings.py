"""Configurations of runs: the demo's, with a stream, a seed and a folder of their own, and what the user overrides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.options import DEMO
from pipeline.config import ConfigError, LearnConfig, digest, load_config
from pipeline.data.demo.abilities import BENCHMARKS

RUNS = "runs"
"""Folder of the runs in that of the experiments; they share experts and answers."""
OURS = ("name", "output", "seed", "stream")
"""Fields that an experiment sets itself."""
DEMO_TASKS = ("digits", "renamed", "clock", "successor", "textures", "later")
"""The demo's stream."""
DEMO_STEPS = 300
"""Optimizer steps of each of its tasks, as in the demo: the same in all experiments, so that experts are found."""


@dataclass(frozen=True)
class Settings:
    """Where experiments are done, and what is overridden in all of their runs."""

    folder: Path
    """Folder of all experiments."""
    overrides: tuple[str, ...] = ()
    """`field=value` each."""

    def __post_init__(self) -> None:
        for override in self.overrides:
            field = override.partition("=")[0]
            if field.partition(".")[0].partition("[")[0] in OURS:
                raise ConfigError(f"override {override!r}: experiments set {field} themselves; leave it out")

    def configure(self, label: str, seed: int, stream: Mapping[str, Any], *own: str) -> LearnConfig:
        """Returns the configuration of the run `label` with a seed; `own` are its overrides, the user's come after them."""
        name = f"{label}-{seed}"
        if self.overrides:  # beside the run at full size
            name += f"-{digest(list(self.overrides))[:6]}"
        ours = [f"name={name}", f"output={self.folder.resolve() / RUNS}", f"seed={seed}"]
        ours.append("router.feature_width=null")  # as many features as any base has by default, not the demo's few
        config = load_config(DEMO, [*ours, *own, *self.overrides], LearnConfig)
        return LearnConfig.model_validate(config.model_dump() | {"stream": dict(stream)})


def task(
    name: str,
    *,
    train: str | None = None,
    on: str | None = None,
    rows: int | None = None,
    prompts: int | None = None,
) -> dict[str, Any]:
    """Returns a task of the demo's data, called `name`; `train` and `on` are its data where they are called otherwise.

    It is learned from at most `rows`, and evaluated on at most `prompts`.
    """
    return {
        "name": name,
        "train": {"path": f"demo://{train or name}/train", "limit": rows},
        "eval": {"path": f"demo://{on or train or name}/eval", "limit": prompts},
    }


def column(name: str, on: str | None = None) -> dict[str, Any]:
    """Returns evaluation prompts that nothing is learned from."""
    return {"name": name, "eval": f"demo://{on or name}/eval"}


def stream(tasks: Sequence[Mapping[str, Any]], more: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Returns a stream of tasks with the base's abilities, and `more` that it is evaluated on."""
    return {
        "tasks": list(tasks),
        "benchmarks": [*(column(name) for name in BENCHMARKS), *more],
        "base_prompts": "demo://general/train",
    }
