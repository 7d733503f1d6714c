"""A registry of five hundred experts: how long its commands take, what a new version costs, and what kills leave behind.

python -m jobs.benchmark registry

Every command runs in a process of its own, as a user runs it; its seconds are the median of three, start included, which
`start_seconds` has alone: Python, MLflow, and one question to the registry. The new version is the pool with one more expert,
registered as learning does. `version_bytes_512` is what a version of a pool with 512 prompt features takes, and
`base_prompts_bytes_512` the statistics of its base prompts, which are stored once.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Annotated, Any

import typer

from jobs.benchmark.registry_faults import faults
from jobs.benchmark.tools.registry_step import STEPS
from jobs.benchmark.tools.synthetic_experts import BASE, FEATURES, synthetic_expert, synthetic_null
from jobs.benchmark.tools.targets import targets_table
from jobs.endings import user_errors
from jobs.terminal import Terminal
from pipeline.config import ConfigError, RouterConfig
from pipeline.files import write_json
from pipeline.models.checkpoints import checkpoint, fingerprint
from pipeline.provenance import now, provenance
from pipeline.registry.base_prompts import stored_base_prompts
from pipeline.registry.experts import register_expert, registered_experts
from pipeline.registry.names import pool_name
from pipeline.registry.pools import register_pool
from pipeline.registry.scores import Score, log_scores
from pipeline.registry.tracking import open_tracking, tracked_run
from pipeline.registry.versions import logged_model
from pipeline.routing import Pool
from pipeline.routing.store import CACHE_VARIABLE, ExpertReference, StoredExpert

TARGETS = {
    "list_seconds": 2.0,
    "show_seconds": 2.0,
    "diff_seconds": 2.0,
    "promote_seconds": 2.0,
    "version_seconds": 5.0,
    "version_bytes": 2.0**20,
    "version_bytes_512": 2.0**20,
}
"""Largest figure that counts as reached."""

REPEATS = 3

WIDE = 512
"""Prompt features of a base of usual size, where `router.feature_width` is left as it is."""

START = "from mlflow import MlflowClient; MlflowClient('{uri}').search_registered_models(max_results=1)"
"""The least that any program does that asks an MLflow registry."""


def registry(
    experts: Annotated[int, typer.Option(help="How many experts, and how many the pool has.", min=3)] = 500,
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("runs"),
    faults_at: Annotated[
        str | None,
        typer.Option(
            envvar="POINTSMAN_TEST_POSTGRESQL",
            help="Address of a PostgreSQL server, e.g. postgresql://me@127.0.0.1/postgres: kills are tried there, in databases "
            "that it makes and drops, instead of in a file.",
        ),
    ] = None,
    kills: Annotated[
        str, typer.Option(help="Which changes are killed at each of their steps, separated by commas; empty: none.")
    ] = ",".join(STEPS),
) -> None:
    """Measure list, show, diff and promote over hundreds of experts, and what one more version of their pool costs."""
    with user_errors():
        terminal, started, killed = Terminal(), now(), [step for step in kills.split(",") if step]
        if unknown := [step for step in killed if step not in STEPS]:
            raise ConfigError(f"--kills {unknown[0]}: no such change; choose from {', '.join(STEPS)}")
        folder = (output / "benchmark-registry").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE_VARIABLE] = str(folder / "experts")  # not among the user's own
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        experiment = open_tracking(uri, "pointsman")
        with tracked_run(experiment, "benchmark-registry", "benchmark-registry") as run_id:
            results = _version(terminal, run_id, experts) | _wide()
        results |= _commands(uri, pool_name(BASE.label, "benchmark"))
        terminal.show(targets_table(f"{experts} experts", results, TARGETS))
        terminal.log(f"of each command, {results['start_seconds']:.2f} s are Python and MLflow starting")
        results |= _faults(terminal, folder / "faults", faults_at, killed)
        terminal.log(f"{results['survived']} of {results['faults']} kills survived")
        write_json(folder / "summary.json", provenance("benchmark-registry", started) | {"registry": results})
        terminal.log(f"summary    {folder / 'summary.json'}")


def _faults(terminal: Terminal, folder: Path, server: str | None, steps: Sequence[str]) -> dict[str, Any]:
    """Returns how many kills there were and how many the registry survived; each takes some seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    kills = []
    for fault in faults(folder, server, steps):
        kills.append(fault)
        terminal.log(f"  {fault.step}, killed before call {fault.call}: {fault.problem or 'survived'}")
    problems = [f"{fault.step} {fault.call}: {fault.problem}" for fault in kills if fault.problem]
    return {"faults": len(kills), "survived": len(kills) - len(problems), "problems": problems}


def _version(terminal: Terminal, run_id: str, count: int) -> dict[str, Any]:
    """Registers all experts, the pool without the last and the pool of all; returns what the last expert's part costs."""
    base_fingerprint, store = fingerprint(checkpoint(BASE)), registered_experts()
    pool = Pool(BASE.label, base_fingerprint, RouterConfig(feature_width=FEATURES), null=synthetic_null())
    versions = {}
    for number in range(count):
        if number % 100 == 0:
            terminal.log(f"  expert {number} of {count}")
        began = monotonic()
        expert = synthetic_expert(f"task_{number:03d}", number, base_fingerprint)
        folder = store.put(expert)
        version = register_expert(BASE.label, folder, card=expert.card, rows=1000)
        versions[expert.card.name] = version
        stored = StoredExpert(ExpertReference.of(folder), store)
        pool = pool.add(stored.registered_as(version.name, int(version.version)))
        if number >= count - 2:
            made = register_pool(pool, BASE, name="benchmark", digest=f"{number}", experts=versions)
            log_scores(run_id, made, [Score(name, "d", 0.5 + i / 2000, 0.1) for i, name in enumerate(pool.names)])
    seconds = monotonic() - began
    return {"experts": count, "version_seconds": seconds, "version_bytes": _bytes(logged_model(made))}


def _wide() -> dict[str, Any]:
    """Returns the bytes of a version with WIDE prompt features, and of its statistics of base prompts."""
    expert = synthetic_expert("wide", WIDE, fingerprint(checkpoint(BASE)), WIDE)
    pool = Pool(BASE.label, expert.card.base_fingerprint, RouterConfig(), [expert], null=synthetic_null(WIDE))
    version = register_expert(BASE.label, registered_experts().put(expert), card=expert.card, rows=1000)
    made = register_pool(pool, BASE, name="wide", digest="wide", experts={"wide": version})
    stored = stored_base_prompts(str(pool.card.null_digest))
    assert stored is not None, "kept before the version"
    return {f"version_bytes_{WIDE}": _bytes(logged_model(made)), f"base_prompts_bytes_{WIDE}": _bytes(stored)}


def _bytes(model: Any) -> float:
    location = Path(model.artifact_location.removeprefix("file://"))
    return float(sum(file.stat().st_size for file in location.rglob("*") if file.is_file()))


def _commands(uri: str, pool: str) -> dict[str, float]:
    """Returns the median seconds of every command."""
    return {
        "start_seconds": _median(["-c", START.format(uri=uri)]),
        "list_seconds": _seconds(uri, ["list"]),
        "show_seconds": _seconds(uri, ["show", pool]),
        "diff_seconds": _seconds(uri, ["diff", f"{pool}/1", f"{pool}/2"]),
        "promote_seconds": _seconds(uri, ["promote", pool, "2"]),
    }


def _seconds(uri: str, words: Sequence[str]) -> float:
    return _median(["-m", "jobs.cli", "registry", *words, "--registry", uri])


def _median(words: Sequence[str]) -> float:
    """Returns the median seconds of a Python process."""
    taken = []
    for _ in range(REPEATS):
        began = monotonic()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        taken.append(monotonic() - began)
    return median(taken)
