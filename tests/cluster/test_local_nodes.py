"""Several nodes on this machine: started and ended, asked by a driver, of other versions, added while a job waits for them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.state import state as ray_state
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group_table
from typer.testing import CliRunner

from cluster.demand import Trainings, Worker
from cluster.local import ClusterError, connect
from cluster.local_nodes import LocalCluster, LocalNode, running, start, stop
from cluster.nodes import REPORTED, cluster_supply
from cluster.preflight import PreflightError, lacks_for_trainings
from cluster.probe import Question
from cluster.survey import CODE, PACKAGES, ask_nodes, judge_answers, judge_base, judge_storage, judge_versions
from cluster.waiting import wait_for_nodes
from jobs.cli import app
from pipeline.storage.mirror import Mirror
from pipeline.storage.remote import RemoteFolder

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
NODES = (LocalNode(2), LocalNode(2, 1, {"zone": "a"}, {"accelerator_type:L4": 1}), LocalNode(2, 1, {"zone": "b"}))
"""The head, and two nodes with a GPU each."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "cluster.json"


@pytest.fixture(scope="module")
def cluster(state: Path) -> Iterator[LocalCluster]:
    """Three nodes, joined by this process."""
    ray.shutdown()  # another module's may still run
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        started = start(NODES, state)
        try:
            connect(started.address)
            yield started
        finally:
            ray.shutdown()
            stop(state)


def test_it_is_found_and_started_once(cluster: LocalCluster, state: Path) -> None:
    assert running(state) == cluster
    with pytest.raises(ClusterError, match=r"a cluster of 3 nodes runs already.*pointsman cluster down"):
        start(NODES, state)


def test_it_listens_on_loopback_only(cluster: LocalCluster) -> None:
    assert cluster.process is not None
    listening = set()
    for process in (cluster.process, *cluster.process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            listening |= {s.laddr.ip for s in process.net_connections("tcp") if s.status == psutil.CONN_LISTEN}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_its_nodes_have_what_they_pretend(cluster: LocalCluster) -> None:
    supply = cluster_supply()
    assert not supply.at_most
    found = sorted((node.cpus, node.gpus, node.labels.get("zone", "")) for node in supply.alive)
    assert found == [(2, 0, ""), (2, 1, "a"), (2, 1, "b")]
    assert sum(Worker(1, 1, "L4").slots(node) for node in supply.alive) == 1
    assert sum(Worker(1, 1, None, {"zone": "!a"}).slots(node) for node in supply.alive) == 1


def test_each_node_unpacks_jobs_into_a_folder_of_its_own(cluster: LocalCluster) -> None:
    folders = {folder.name for folder in Path(cluster.folder).glob("ray/session_latest/runtime_resources*")}
    assert folders >= {f"runtime_resources-{number}" for number in range(3)}, "beside them drivers have theirs"


def test_equal_nodes_with_one_folder_have_nothing_to_complain_of(cluster: LocalCluster, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_text("12345")
    asked = ask_nodes(Question(PACKAGES, CODE, base=str(base)), tmp_path / "runs" / "deep")
    assert len(asked.others) == 2
    assert judge_answers(asked) == []
    findings = judge_versions(asked), judge_base(asked, str(base)), judge_storage(asked, tmp_path)
    assert [finding.status for finding in findings] == ["ok"] * 3, findings
    assert "on 3 nodes" in findings[0].text
    assert [file.name for file in tmp_path.iterdir()] == ["base"], "nothing is left behind"


def test_nodes_meet_at_an_address(cluster: LocalCluster, tmp_path: Path) -> None:
    there = RemoteFolder(f"local://{tmp_path}/there")
    output = Mirror(tmp_path / "here", there)
    found = judge_storage(ask_nodes(Question(), output), output)
    assert found.status == "ok"
    assert "written on 3 nodes" in found.text
    assert not (tmp_path / "here").exists()
    assert there.files() == {}


def test_a_node_that_lacks_a_file_is_named(cluster: LocalCluster, tmp_path: Path) -> None:
    asked = ask_nodes(Question(base=str(tmp_path / "missing")))
    found = judge_base(asked, "x")
    assert found.status == "failed"
    assert found.text.count("no such file or directory") == 3


def test_the_doctor_looks_at_all_of_it(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_text(STREAM.format(output=tmp_path / "runs"))

    def doctor(*words: str) -> tuple[int, dict[str, Any]]:
        outcome = CliRunner().invoke(app, ["doctor", str(tmp_path / "stream.yaml"), *words, "--json"])
        return outcome.exit_code, {finding["name"]: finding for finding in json.loads(outcome.output)}

    code, found = doctor()
    assert code == 0, found
    assert list(found) == ["ray", "room", "deepspeed", "versions", "base", "storage", "registry"]
    assert {finding["status"] for finding in found.values()} == {"ok"}, found
    assert "6 CPU(s) and 2 GPU(s) on 3 node(s)" in found["ray"]["text"]
    code, found = doctor("training.workers=4", "training.gpu=true", f"base.path={tmp_path / 'missing'}")
    assert code == 2
    assert found["room"]["status"] == found["base"]["status"] == "failed"
    assert found["room"]["remedy"].startswith("lower training.workers to 2")
    assert found["storage"]["status"] == "ok"
    assert not (tmp_path / "runs").exists(), "looking changes nothing"


STREAM = """
name: looked-at
output: {output}
stream:
  tasks: [{{name: digits, train: demo://digits/train, eval: demo://digits/eval}}]
training: {{cpus_per_worker: 1}}
"""


def test_placement_of_training_workers_is_what_ray_does(cluster: LocalCluster) -> None:
    """Ray places groups of bundles exactly where the arithmetic has places for them."""
    nodes = cluster_supply().alive
    cases = [
        (Trainings(Worker(1, 1), 2, strategy="STRICT_SPREAD"), True),
        (Trainings(Worker(1, 1), 2, strategy="STRICT_PACK"), False),
        (Trainings(Worker(1, 1, "L4")), True),
        (Trainings(Worker(1, 1, "L4"), 2), False),
        (Trainings(Worker(1, 1, None, {"zone": "in(a,b)"}), 2), True),
        (Trainings(Worker(1, 1, None, {"zone": "!a"}), 2), False),
        (Trainings(Worker(1, 1, None, {"zone": "!in(a,b)"})), False),
    ]
    for trainings, fits in cases:
        assert (trainings.that_fit(nodes) >= 1) == fits, trainings
        [group] = [group.place() for group in trainings.groups]
        assert group.wait(5 if fits else 1) == fits, trainings
        ray.util.remove_placement_group(group)


def test_nodes_that_may_come_are_waited_for(cluster: LocalCluster, tmp_path: Path) -> None:
    """What a platform with an autoscaler reports is reported here, and the node that comes is a real one."""
    group = autoscaler_pb2.NodeGroupConfig(resources={"CPU": 2, "GPU": 1}, max_count=3, name="gpu")
    config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
    client = ray._private.worker.global_worker.gcs_client
    client.report_cluster_config(config.SerializeToString())
    trainings, said = Trainings(Worker(1, 1), 3), []
    supply = cluster_supply()
    assert (supply.autoscaler, len(supply.alive), len(supply.at_most)) == (REPORTED, 3, 4)

    def lacks(nodes):
        return lacks_for_trainings(trainings, nodes, supply)

    with pytest.raises(
        PreflightError, match=r"has not added enough nodes in 1 s: 3 worker\(s\).*only 2 worker\(s\) fit"
    ):
        wait_for_nodes(lacks, trainings.groups, supply, seconds=1, say=said.append)
    added = threading.Timer(1, lambda: start_node(cluster, tmp_path))
    added.start()
    assert len(wait_for_nodes(lacks, trainings.groups, supply, seconds=60, say=said.append).alive) == 4
    assert any(line.startswith("waiting for the cluster's autoscaler: 3 worker(s)") for line in said[1:])
    assert said[-1].strip().startswith("8 CPU(s) and 3 GPU(s) on 4 node(s) after")
    states = {group["state"] for group in placement_group_table().values()}
    assert states <= {"REMOVED"}, "what was asked for is given back"
    assert ray_state.get_cluster_config() == config


def start_node(cluster: LocalCluster, folder: Path) -> None:
    """Adds a node whose environment holds another release of peft.

    Not of this project: where it is installed for editing, its metadata lie in the folder in which a driver starts, and Ray
    puts that before all else that a node would import.
    """
    other = folder / "peft-99.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.0\n")
    code = (
        "from ray._private.node import Node; from ray._private.parameter import RayParams; import time; "
        f"Node(RayParams(num_cpus=2, num_gpus=1, gcs_address={cluster.address!r}, node_ip_address='127.0.0.1', "
        "min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=False, "
        "object_store_memory=2**27), head=False, shutdown_at_exit=True, spawn_reaper=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    ADDED.append(subprocess.Popen([sys.executable, "-c", code], env=environment))


ADDED: list[subprocess.Popen[bytes]] = []


def test_a_node_of_another_release_is_named(cluster: LocalCluster) -> None:
    """The node that has come last."""
    try:
        survey = ask_nodes(Question(PACKAGES, CODE))
        assert not judge_answers(survey), "a node that has just come is asked until it answers"
        found = judge_versions(survey)
        assert found.status == "failed"
        assert "peft 99.0 (here " in found.text
        assert found.text.count("peft") == 1
    finally:
        for process in ADDED:
            process.terminate()
            process.wait(30)


def test_a_node_that_was_killed_is_counted_out(cluster: LocalCluster, state: Path) -> None:
    assert cluster.process is not None
    raylets = [child for child in cluster.process.children() if child.name() == "raylet"]
    max(raylets, key=lambda raylet: raylet.create_time()).kill()
    deadline = time.monotonic() + 20
    while (now := running(state)) == cluster and time.monotonic() < deadline:
        time.sleep(0.2)
    assert now is not None
    assert (now.nodes, now.lost) == (cluster.nodes[:2], 1)


def test_it_ends_with_all_that_it_has_started(cluster: LocalCluster, state: Path) -> None:
    assert cluster.process is not None
    family = [cluster.process, *cluster.process.children(recursive=True)]
    ray.shutdown()
    ended = stop(state)
    assert ended is not None
    assert ended.pid == cluster.pid
    assert stop(state) is None
    assert running(state) is None
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert not Path(cluster.folder).exists()


def test_a_file_that_names_another_process_ends_nothing(state: Path) -> None:
    """Process ids are used again: this one is ours, and it did not start then."""
    values = {"address": "", "dashboard": "", "nodes": [], "pid": os.getpid(), "created": 1.0, "folder": "/nowhere"}
    state.write_text(json.dumps(values))
    assert running(state) is None
    assert stop(state) is None
