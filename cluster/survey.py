"""Asks all nodes of a cluster what a job needs of them, and judges the answers: one finding for each check."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import uuid4

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import probe
from cluster.preflight import PreflightError
from cluster.probe import Answer, Question
from pipeline.storage.mirror import Folder, Mirror

PACKAGES = ("ray", "pointsman", "torch", "transformers", "peft", "deepspeed", "mlflow", "pyarrow")
"""Distributions of which all nodes need the same version."""

CODE = ("pipeline", "cluster")
"""Packages that workers run."""

ANSWER_SECONDS = 120.0
"""How long a node may take: a process starts first, and a busy machine takes its time."""

VISIBLE_SECONDS = 30.0
"""How long a file may take to be seen from another node: network file systems remember folders for some seconds."""

RETRY_SECONDS = 0.5
"""How long a node that Ray's scheduler does not know yet is not asked again."""

Answers = Mapping[str, Answer | str]
"""By name of the node; a text says why there is no answer."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    text: str
    """What was found."""
    status: Literal["ok", "warning", "failed"] = "ok"
    remedy: str | None = None


@dataclass(frozen=True)
class Survey:
    """What all nodes have answered."""

    here: Answer
    """What the driver's own node answers."""
    others: Answers
    unseen: tuple[str, ...] = ()
    """Nodes whose file in the storage is not to be seen here."""

    @property
    def nodes(self) -> str:
        """Number of nodes, for messages."""
        return "1 node" if not self.others else f"{1 + len(self.others)} nodes"

    @property
    def answered(self) -> dict[str, Answer]:
        """The other nodes' answers, where there is one."""
        return {name: answer for name, answer in self.others.items() if isinstance(answer, Answer)}


def ask_nodes(question: Question, output: Folder | None = None, seconds: float = ANSWER_SECONDS) -> Survey:
    """Asks this node and all others that can run workers; `output` is the folder that all of them must see.

    Raises OSError, or StorageError, if this node cannot write into it.
    """
    with _shared(output) as folder:
        question = replace(question, storage=folder.uri if folder else None)
        others = _ask(question, seconds)
        here = Answer(**probe.look(question, "here"))
        asked = [
            name for name, answer in others.items() if isinstance(answer, Answer) and "storage" not in answer.errors
        ]
        return Survey(here, others, () if folder is None else _unseen(folder, asked))


def judge_answers(survey: Survey) -> list[Finding]:
    """Returns a failed finding for each node that has not answered."""
    return [
        Finding("nodes", f"{name}: {answer}", "failed", "see `ray status` and the node's logs; end it, or repair it")
        for name, answer in survey.others.items()
        if isinstance(answer, str)
    ]


def judge_versions(survey: Survey) -> Finding:
    """Compares Python, packages and this project's own code on all nodes with those here."""
    here = survey.here
    wrong: dict[str, list[str]] = {}
    for name, answer in survey.answered.items():
        found = {
            "Python": (answer.python, here.python),
            **{p: (v, here.versions[p]) for p, v in answer.versions.items()},
        }
        differing = [
            f"{what} {is_ or 'is missing'} (here {wanted})" for what, (is_, wanted) in found.items() if is_ != wanted
        ]
        if answer.code != here.code:
            differing.append("the code of pointsman is " + ("another" if answer.code else "missing"))
        if differing:
            wrong[name] = differing
    if wrong:
        return Finding(
            "versions",
            "; ".join(f"{name}: {', '.join(differing)}" for name, differing in wrong.items()),
            "failed",
            "start all nodes from one image, or submit the job with its code (--address)",
        )
    shown = ", ".join(f"{p} {here.versions[p]}" for p in ("ray", "pointsman") if here.versions.get(p))
    return Finding("versions", f"Python {here.python}, {shown}, code {here.code} on {survey.nodes}")


def judge_base(survey: Survey, path: str) -> Finding:
    """Whether every node reads the base's files, and the same ones."""
    wrong = _errors(survey, "base")
    for name, answer in survey.answered.items():
        if "base" not in answer.errors and answer.files != survey.here.files and "base" not in survey.here.errors:
            differing = sorted(
                file for file in answer.files.keys() | survey.here.files.keys()
                if answer.files.get(file) != survey.here.files.get(file)
            )  # fmt: skip
            wrong.append(f"{name}: other files than here: {', '.join(differing[:3])}")
    if wrong:
        remedy = (
            "mount the storage that holds it on every node, or let base.path be a hub id or an address (s3://, gs://)"
        )
        return Finding("base", f"base.path={path}: {'; '.join(wrong)}", "failed", remedy)
    downloads = [name for name, answer in {"here": survey.here, **survey.answered}.items() if "base" in answer.notes]
    note = f"; downloaded on {len(downloads)} of them first" if downloads else ""
    size = f"{sum(survey.here.files.values()) / 1e9:.2f} GB on" if survey.here.files else "found by"
    return Finding("base", f"{path}: {size} {survey.nodes}{note}")


def judge_storage(survey: Survey, output: Folder) -> Finding:
    """Whether every node writes into the same folder."""
    there = Mirror.of(output).remote is not None
    wrong = _errors(survey, "storage")
    wrong += [f"{name}: what it writes is not seen here: it has another folder of that name" for name in survey.unseen]
    if wrong:
        remedy = (
            "mount one storage under this path on all nodes and let `output` lie in it, or let it be an address (s3://)"
        )
        if there:
            remedy = "let every node reach it, with credentials in the environment that its Ray was started in"
        return Finding("storage", f"output={output}: {'; '.join(wrong)}", "failed", remedy)
    return Finding("storage", f"{output}: written on {survey.nodes}" + (", and seen on all" if survey.others else ""))


def judge_registry(survey: Survey, address: str) -> Finding:
    """Whether MLflow's server answers on all nodes; learning itself asks it from the driver alone."""
    wrong = _errors(survey, "registry")
    if not wrong:
        return Finding("registry", f"{address} answers on {survey.nodes}")
    remedy = (
        "let the server answer to this name: `mlflow server --allowed-hosts HOST:PORT,...`"
        if any("403" in reason for reason in wrong)
        else "start that server, correct registry.uri, or open the network between them"
    )
    failed = "registry" in survey.here.errors
    return Finding("registry", f"registry.uri={address}: {'; '.join(wrong)}", "failed" if failed else "warning", remedy)


def _errors(survey: Survey, what: str) -> list[str]:
    answers = {"this node": survey.here, **survey.answered}
    return [f"{name}: {answer.errors[what]}" for name, answer in answers.items() if what in answer.errors]


def raise_failed(findings: Iterable[Finding]) -> None:
    """Raises PreflightError with all that has failed, if anything has."""
    failed = [f.text + (f"\n    {f.remedy}" if f.remedy else "") for f in findings if f.status == "failed"]
    if failed:
        raise PreflightError("\n".join(failed))


def other_nodes() -> list[dict[str, Any]]:
    """Returns Ray's entries of the nodes that workers can run on, without that of this process."""
    here = ray.get_runtime_context().get_node_id()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU")]


def _ask(question: Question, seconds: float) -> Answers:
    """Asks all nodes but this one that have CPUs, side by side."""
    names = {node["NodeID"]: f"node {node['NodeID'][:8]} at {node['NodeManagerAddress']}" for node in other_nodes()}
    if not names:
        return {}
    cloudpickle.register_pickle_by_value(sys.modules[probe.__name__])
    task = ray.remote(num_cpus=0, max_retries=0)(probe.look)

    def ask(node: str) -> ray.ObjectRef[dict[str, Any]]:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return task.options(scheduling_strategy=there).remote(question, names[node])

    until = time.monotonic() + seconds
    running = {ask(node): node for node in names}
    answers: dict[str, Answer | str] = {}
    while running and (left := until - time.monotonic()) > 0:
        done, _ = ray.wait(list(running), timeout=left)
        for reference in done:
            node = running.pop(reference)
            try:
                answers[names[node]] = Answer(**ray.get(reference))
            except ray.exceptions.TaskUnschedulableError:
                # It has just come: Ray's list of nodes has it, its scheduler not yet.
                if node not in {other["NodeID"] for other in other_nodes()}:
                    answers[names[node]] = "it has gone"
                    continue
                time.sleep(RETRY_SECONDS)
                running[ask(node)] = node
            except ray.exceptions.RayError as error:
                answers[names[node]] = next(iter(str(error).splitlines()), type(error).__name__)
    for reference, node in running.items():  # it may hang in a dead file system: nothing is waited for any more
        ray.cancel(reference, force=True)
        answers[names[node]] = f"no answer for {seconds:g} s"
    return answers


@contextmanager
def _shared(output: Folder | None) -> Iterator[Mirror | None]:
    """Yields a folder in `output` with the file `asked`; nothing is left of it, nor of folders that were made for it."""
    if output is None:
        yield None
        return
    folder = Mirror.of(output) / f".doctor.{uuid4().hex}"
    path = folder.local
    if folder.remote is not None:
        folder.remote.write("asked", path.name.encode())
        try:
            yield folder
        finally:
            folder.remote.delete_all()
        return
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.mkdir(parents=True)
        (path / "asked").write_text(path.name)
        yield folder
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # somebody else uses it meanwhile
            for left in made:
                left.rmdir()


def _unseen(folder: Mirror, nodes: Iterable[str]) -> tuple[str, ...]:
    """Returns the nodes whose file does not appear here in time."""
    missing, until = list(nodes), time.monotonic() + VISIBLE_SECONDS
    while missing := [name for name in missing if not folder.exists(name)]:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    return tuple(missing)
