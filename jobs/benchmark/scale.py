"""Measures the cost per task over a hundred cheap tasks: seconds, bytes of a pool version, answers, memory.

    pointsman benchmark scale

The tasks are those of `data.demo.synthetic`, learned in a few steps each by the real session, evaluation and
registry: what they learn does not matter here. The promise is that the hundredth task costs what the tenth did.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from urllib.parse import urlparse

import typer

from jobs.benchmark.tools.targets import targets_table
from jobs.endings import user_errors
from jobs.results import print_next_steps
from jobs.terminal import Terminal
from pipeline.config import ConfigError, LearnConfig
from pipeline.learning.learn import learn_stream, publish
from pipeline.learning.opening import open_session
from pipeline.learning.session import StreamSession
from pipeline.registry.versions import logged_model, number, versions_of

EARLY, LAST = slice(10, 20), slice(-10, None)
"""The tasks that are compared, counted from 0."""
FEWEST = 30
"""Tasks from which on early and last ones are apart."""
TARGETS = {"ratio_last_to_early": 1.10, "bytes_ratio": 1.05, "answers_per_prompt": 1.2, "memory_ratio": 1.03}
"""Most that each figure should be."""


def scale(
    tasks: Annotated[int, typer.Option(help=f"How many tasks are learned, {FEWEST} at least.")] = 100,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each task's LoRA.")] = 12,
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs"),
) -> None:
    """Measure whether the hundredth task costs what the tenth did: seconds, bytes, answers, memory."""
    with user_errors():
        if tasks < FEWEST:
            raise ConfigError(f"--tasks {tasks}: at least {FEWEST}, so that the last ten are not the first twenty")
        with open_session(_settings(tasks, steps, output), job="benchmark scale", progress=Terminal()) as session:
            learned = learn_stream(session)
            results = measure(session, learned.summary)
            report = publish(session, learned.summary | {"scale": results})
            _show(session, results)
            print_next_steps(session, report)


def measure(session: StreamSession, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the summary's part `scale`: medians of early and last tasks, and their ratios."""
    metrics = list(summary["tasks"].values())
    seconds = _pair([task["turn_seconds"] for task in metrics])
    memory = _pair([float(task["memory_bytes"]) for task in metrics])
    size = _pair(version_bytes(session))
    answers = summary["answers"]
    return {
        "tasks": len(metrics),
        "seconds": seconds,
        "overhead_seconds": _pair([task["overhead_seconds"] for task in metrics]),
        "pool_version_bytes": size,
        "memory_bytes": memory,
        "ratio_last_to_early": seconds["last"] / seconds["early"],
        "bytes_ratio": size["last"] / size["early"],
        "answers_per_prompt": answers["generated"] / answers["single_pass"],
        "memory_ratio": memory["last"] / memory["early"],
        "routing_accuracy": summary["continual"]["routing_accuracy"],
    }


def _pair(values: Sequence[float]) -> dict[str, float]:
    return {"early": median(values[EARLY]), "last": median(values[LAST])}


def version_bytes(session: StreamSession) -> list[float]:
    """Returns the bytes of every version of the run's pools in the registry, in their order; artifacts lie in local files."""
    sizes = {}
    for version in versions_of(session.pool_model):
        folder = Path(urlparse(logged_model(version).artifact_location).path)
        sizes[number(version)] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return [float(sizes[number]) for number in sorted(sizes)]


def _settings(tasks: int, steps: int, output: Path) -> LearnConfig:
    names = [f"synthetic_{number:03d}" for number in range(tasks)]
    return LearnConfig.model_validate({
        "name": "benchmark-scale",
        "output": str(output / "benchmark-scale"),
        "base": {"path": "tiny"},
        "stream": {
            "tasks": [
                {"name": name, "train": f"demo://{name}/train", "eval": {"path": f"demo://{name}/eval", "limit": 20}}
                for name in names
            ],
            "benchmarks": [{"name": "shape", "eval": {"path": "demo://shape/eval", "limit": 20}}],
            "base_prompts": "demo://general/train",
        },
        "expert": {"rank": 4, "steps": steps, "batch_size": 16, "learning_rate": 5e-3},
        "router": {"steps": max(1, steps // 6), "feature_width": 128},
        # One core trains, the other one reads.
        "data": {"num_readers": 1},
        "training": {"cpus_per_worker": 1},
        "evaluation": {"max_new_tokens": 4},
    })  # fmt: skip


def _show(session: StreamSession, results: Mapping[str, Any]) -> None:
    session.progress.show(targets_table(f"{results['tasks']} tasks", results, TARGETS))
    early, last = (f"{results['seconds'][when]:.1f}" for when in ("early", "last"))
    session.progress.log(f"{early} s per task at first, {last} s at the end")
