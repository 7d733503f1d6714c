"""Kills at every step: each change of a registry is cut off before each of its writing calls, then made again.

After the kill everything that is registered must be whole: its upload complete and readable, its experts there, every alias on
a version that exists. After the same command again the registry must be what it is without a kill: nothing lost or doubled.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient

from jobs.benchmark.tools.registry_copies import copied, new_registry
from jobs.benchmark.tools.registry_step import DIED, STEPS
from jobs.benchmark.tools.synthetic_experts import former_registry
from pipeline.registry.base_prompts import fetch_base_prompts
from pipeline.registry.experts import download_expert, registered_experts
from pipeline.registry.loading import download_pool
from pipeline.registry.names import read_name
from pipeline.registry.tracking import open_tracking, tracked_run
from pipeline.registry.versions import DIGEST, logged_model, number, versions_of
from pipeline.routing import Expert, Pool
from pipeline.routing.null_store import NullStore

State = dict[str, tuple[list[str], dict[str, str]]]
"""By registered model: digests of its versions in their order, and the digest that each alias stands for."""


@dataclass(frozen=True)
class Fault:
    """A kill before one writing call of a step."""

    step: str
    call: int
    problem: str = ""
    """What was not whole afterwards, or what the same command did not mend; empty where all is well."""


def faults(folder: Path, server: str | None = None, steps: Sequence[str] = tuple(STEPS)) -> Iterator[Fault]:
    """Yields every fault of `steps`, in a registry in `folder`, or in databases of a PostgreSQL server.

    Steps build on each other: the others are made without a kill.
    """
    folder.mkdir(parents=True)
    with new_registry(server, folder) as whole:
        experiment = open_tracking(whole, "pointsman", output=folder)
        with tracked_run(experiment, "former", "former") as run_id:
            former_registry(experiment, run_id, "former", "mine")
        yield from _faults(whole, steps)


def _faults(whole: str, steps: Sequence[str]) -> Iterator[Fault]:
    for step in STEPS:
        before = copied(whole, f"before_{step}")
        assert _run(whole, step, 0) == 0, f"{step} fails without a kill"
        if step not in steps:
            continue
        wanted = _state(whole)
        call, dying = 1, True
        while dying:
            with ThreadPoolExecutor(2) as pool:
                calls = [call, call + 1]
                copies = [copied(before, f"{step}_{n}") for n in calls]
                codes = list(pool.map(_run, copies, [step] * 2, calls))
                problems = [_problem(copy) if code == DIED else "" for copy, code in zip(copies, codes, strict=True)]
                again = list(pool.map(_run, copies, [step] * 2, [0] * 2))
            for n, copy, code, problem, code_again in zip(calls, copies, codes, problems, again, strict=True):
                if code != DIED:
                    dying = False
                    assert code == 0, f"{step} fails before its call {n}"
                    continue
                yield Fault(step, n, problem or _difference(copy, wanted, code_again))
            call += 2


def _run(uri: str, step: str, call: int) -> int:
    command = [sys.executable, "-m", "jobs.benchmark.tools.registry_step", step, str(call)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def _difference(uri: str, wanted: State, code: int) -> str:
    if code != 0:
        return f"the same command ends with {code}"
    state = _state(uri)
    wrong = [name for name in sorted({*state, *wanted}) if state.get(name) != wanted.get(name)]
    return f"{wrong[0]} is {state.get(wrong[0])}, not {wanted.get(wrong[0])}" if wrong else ""


def _state(uri: str) -> State:
    mlflow.set_tracking_uri(uri)
    state = {}
    for model in MlflowClient().search_registered_models():
        if read_name(model.name) is not None:
            digests = {number(v): logged_model(v).params[DIGEST] for v in reversed(versions_of(model.name))}
            state[model.name] = (
                list(digests.values()),
                {alias: digests[int(version)] for alias, version in model.aliases.items()},
            )
    return state


def _problem(uri: str) -> str:
    """Returns what is not whole in a registry; empty where all is."""
    mlflow.set_tracking_uri(uri)
    for model in MlflowClient().search_registered_models():
        named = read_name(model.name)
        if named is None:
            continue
        numbers = set()
        for version in versions_of(model.name):
            numbers.add(number(version))
            what = f"{model.name}/{version.version}"
            if logged_model(version).status != "READY":
                return f"the upload of {what} is not complete"
            former = "Moved from" in (version.description or "")
            with TemporaryDirectory() as scratch:
                if named.kind == "expert":
                    download = download_expert(named.base, named.name, number(version), Path(scratch) / "expert")
                    Expert.load(download).check_trained()
                elif named.kind == "pool" and not former:
                    folder = download_pool(f"models:/{what}", scratch)
                    nulls = NullStore(Path(scratch) / "base_prompts", fetch_base_prompts)  # not from a cache
                    for expert in Pool.load(folder, registered_experts(), nulls).experts.values():
                        expert.check_trained()
        if astray := [alias for alias, version in model.aliases.items() if int(version) not in numbers]:
            return f"alias {astray[0]} of {model.name} stands for a version that is not there"
    return ""
