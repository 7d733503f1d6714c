"""What must be true before a job starts: room on the cluster, and nodes that are equal and reach what they need.

`pointsman learn` raises what fails; `pointsman doctor` shows all of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit

from mlflow import MlflowClient

from cluster.deepspeed_ops import check_tools, extensions_folder, op_is_built
from cluster.local import ClusterInfo
from cluster.nodes import cluster_supply, totals
from cluster.preflight import PreflightError
from cluster.probe import Question
from cluster.survey import (
    CODE,
    PACKAGES,
    Finding,
    ask_nodes,
    judge_answers,
    judge_base,
    judge_registry,
    judge_storage,
    judge_versions,
    other_nodes,
    raise_failed,
)
from cluster.waiting import wait_for_nodes
from pipeline.config import LearnConfig, without_secrets
from pipeline.errors import UserError
from pipeline.learning.capacity import Capacity
from pipeline.learning.output import output_of
from pipeline.learning.progress import Progress
from pipeline.registry.addresses import SERVERS, database_path
from pipeline.registry.failures import registry_failures
from pipeline.registry.retries import REGISTRY_URI
from pipeline.registry.tracking import use_registry
from pipeline.storage.remote import StorageError


def check_room(capacity: Capacity, progress: Progress, *, trains: bool) -> None:
    """Raises PreflightError if the cluster never has room; waits for nodes that its autoscaler may add."""
    capacity.check(trains=trains)
    wait_for_nodes(
        lambda nodes: capacity.lacks(nodes, trains=trains),
        capacity.groups(trains=trains),
        capacity.supply,
        seconds=capacity.config.training.node_wait_seconds,
        say=progress.log,
    )


def check_nodes(config: LearnConfig, progress: Progress) -> None:
    """Raises PreflightError where another node differs from this one, or does not reach base and output."""
    if not other_nodes():
        return  # what this node lacks, the job finds out by itself
    findings = list(node_findings(config))
    raise_failed(findings)
    for finding in findings:
        if finding.status == "warning":
            progress.log(f"{finding.text}; {finding.remedy}", "yellow")


def node_findings(config: LearnConfig | None) -> Iterator[Finding]:
    """Yields what all nodes have to say: versions, and for a configuration base, output and registry."""
    if config is None:
        asked = ask_nodes(Question(PACKAGES, CODE))
        yield from judge_answers(asked)
        yield judge_versions(asked)
        return
    question = Question(
        PACKAGES,
        CODE,
        base=None if config.base.path == "tiny" else config.base.path,
        revision=config.base.revision,
        registry=_without_user(config.tracking_uri) if config.tracking_uri.startswith(SERVERS) else None,
    )
    output = output_of(config)
    try:
        asked, unwritable = ask_nodes(question, output), None
    except StorageError as error:
        unwritable = Finding("storage", f"output={error}", "failed")
        asked = ask_nodes(question)
    except OSError as error:
        unwritable = Finding(
            "storage",
            f"output={output}: this node cannot write there: {error.strerror or error}",
            "failed",
            "change its permissions, or choose another `output`",
        )
        asked = ask_nodes(question)
    yield from judge_answers(asked)
    yield judge_versions(asked)
    if question.base is None:
        yield Finding("base", "tiny, which ships with the project")
    else:
        yield judge_base(asked, without_secrets(question.base))
    yield unwritable or judge_storage(asked, output)
    if question.registry is not None:
        yield judge_registry(asked, without_secrets(question.registry))


def all_findings(config: LearnConfig | None, cluster: ClusterInfo) -> Iterator[Finding]:
    """Yields the outcome of every check as it is made; nothing is waited for, and nothing is registered."""
    supply = cluster_supply()
    more = f"; {totals(supply.at_most)} with all that {supply.autoscaler} may add" if supply.at_most else ""
    where = "starts on this machine" if cluster.started else f"joined at {cluster.address}"
    yield Finding("ray", f"{where}: {totals(supply.alive)}{more}")
    if config is not None:
        yield _room(Capacity(config, cluster, supply))
    if config is None or not config.training.gpu:
        yield _operator()
    reached = True
    for finding in node_findings(config):
        reached &= finding.name != "registry" or finding.status == "ok"
        if finding.name != "registry" or not reached:
            yield finding
    if config is not None and reached:
        yield _registry(config)


def _without_user(uri: str) -> str:
    """Returns a server's address without user and password: other nodes need not know them."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _room(capacity: Capacity) -> Finding:
    try:
        capacity.check(trains=True)
    except PreflightError as error:
        return failed_finding("room", error)
    missing = capacity.lacks(capacity.supply.alive, trains=True)
    if missing is None:
        demand, inference = replace(capacity.demand, extra_cpus=0), capacity.inference
        return Finding("room", f"{demand}; evaluation.workers={inference.count} fit, too")
    seconds = capacity.config.training.node_wait_seconds
    remedy = (
        f"a job waits for {capacity.supply.autoscaler} to add nodes, {seconds:g} s at most (training.node_wait_seconds)"
    )
    return Finding("room", missing.splitlines()[0], "warning", remedy)


def _operator() -> Finding:
    """Whether DeepSpeed's operator is there, or can be compiled."""
    if op_is_built(extensions_folder()):
        return Finding("deepspeed", "its operator for CPUs is compiled")
    try:
        check_tools()
    except PreflightError as error:
        return failed_finding("deepspeed", error)
    return Finding("deepspeed", "its operator for CPUs is compiled by the first training, in 40 s to 2 min")


def _registry(config: LearnConfig) -> Finding:
    """Whether this user may look at the registry; a file that is not there yet is made by the first run."""
    uri, shown = config.tracking_uri, without_secrets(config.tracking_uri)
    try:
        database = database_path(uri)
        if database is not None and not database.exists():
            return Finding("registry", f"{shown}, made by the first run")
        with registry_failures():
            use_registry(uri, REGISTRY_URI)
            experiments = len(MlflowClient().search_experiments())
    except UserError as error:
        return failed_finding("registry", error)
    return Finding("registry", f"{shown}: {experiments} experiment(s)")


def failed_finding(name: str, error: UserError) -> Finding:
    """Returns a finding of an error whose last line may be the remedy."""
    text, _, remedy = str(error).partition("\n")
    return Finding(name, text, "failed", " ".join(remedy.split()) or None)
