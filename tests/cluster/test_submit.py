"""Against a real head with token authentication; the client is a process of its own, since Ray reads its mode once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import ClusterError, connect
from cluster.submit import SubmitError, submit
from tests.cluster.conftest import PATIENCE, ROOT, Head, free_port

pytestmark = pytest.mark.ray

CLIENT = """
import dataclasses, json, sys
from pathlib import Path
import ray  # first, as in a process that has used Ray before: the mode has been read by then
from cluster.submit import SubmitError, submit
address, folder, name, *entrypoint = sys.argv[1:]
try:
    outcome = dataclasses.asdict(submit(entrypoint, address, Path(folder), submission_id=name))
except SubmitError as error:
    outcome = {"error": str(error)}
print(json.dumps(outcome))
"""

JOB = """
import os
from pathlib import Path
import ray
from cluster.local import connect
from cluster.preflight import build_deepspeed_ops
info = connect()
print("JOINED", not info.started, sorted(path.name for path in Path.cwd().iterdir()))
print("WORKER", ray.get(ray.remote(lambda: os.environ["TOKENIZERS_PARALLELISM"]).remote()))
print("OPERATOR", build_deepspeed_ops()["DS_ACCELERATOR"])
"""


def run_client(head: Head, folder: Path, name: str, *entrypoint: str, **environment: str) -> tuple[str, dict]:
    """Returns what the client printed, and the outcome in its last line."""
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, head.address, str(folder), name, *entrypoint],
        env=head.client | environment, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert client.returncode == 0, client.stderr
    assert head.token not in client.stdout + client.stderr
    return client.stdout, json.loads(client.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with this project's code and things that must stay here."""
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster")
    (tmp_path / "job.py").write_text(JOB)
    for name in ("runs", ".git", "mlruns"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_text("stays here")
    return tmp_path


def test_job_joins_its_cluster_and_its_output_appears_here(head: Head, folder: Path) -> None:
    printed, outcome = run_client(head, folder, "joins", "python", "job.py")
    assert outcome == outcome | {"submission_id": "joins", "status": "SUCCEEDED", "exit_code": 0}, printed
    assert "JOINED True ['cluster', 'job.py']" in printed
    assert "WORKER false" in printed
    assert "OPERATOR cpu" in printed


def test_exit_code_of_the_job_is_ours(head: Head, tmp_path: Path) -> None:
    printed, outcome = run_client(head, tmp_path, "fails", "python", "-c", "import sys; print('a; b'); sys.exit(3)")
    assert (outcome["status"], outcome["exit_code"]) == ("FAILED", 3)
    assert "a; b" in printed
    again = run_client(head, tmp_path, "fails", "true")[1]
    assert "did not take the job" in again["error"]


def test_without_the_token_the_remedy_is_named(head: Head, tmp_path: Path) -> None:
    error = run_client(head, tmp_path, "stranger", "true", HOME=str(tmp_path))[1]["error"]
    assert "refuses this user" in error
    assert "~/.ray/auth_token" in error


def test_no_head_at_the_address(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(SubmitError, match="no Ray head answers at"):
        submit(["true"], f"http://127.0.0.1:{free_port()}", tmp_path)


def test_address_must_be_the_dashboards(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match="e.g. http://HOST:8265"):
        submit(["true"], "ray://127.0.0.1:10001", tmp_path)


def test_drivers_do_not_join_through_ray_client() -> None:
    with pytest.raises(ClusterError, match="submit the job"):
        connect("ray://127.0.0.1:10001")


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1", "127.0.0.1:head"])
def test_no_cluster_at_the_address(address: str) -> None:
    with pytest.raises(ClusterError, match=r"cannot join.*\n.*unset RAY_ADDRESS"):
        connect(address.format(port=free_port()))
