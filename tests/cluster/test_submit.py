"""Against a real head with token authentication; clients are processes of their own, since Ray reads its mode once."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import requests

from cluster.client import SubmitError, connected
from cluster.local import ClusterError, connect
from jobs.benchmark.tools.ray_head import free_port
from tests.cluster.conftest import PATIENCE, Head

pytestmark = pytest.mark.ray

CLIENT = """
import json, sys
import ray  # first, as in a process that has used Ray before: the mode has been read by then
from cluster.client import SubmitError, connected
from cluster.environment import FILE, to_bytes
from cluster.package import Package
from cluster.submit import follow, submit
address, name, settings, *entrypoint = sys.argv[1:]
package = Package()
package.add_code()
package.write("job.py", JOB)
package.write(FILE, to_bytes({"WORD": "hunter2"}), mode=0o600)
try:
    client = connected(address)
    submitted = submit(
        client, address, entrypoint=entrypoint, name=name, package=package, metadata={"settings": settings}
    )
    print("SUBMITTED", submitted.submission_id, submitted.attached, flush=True)
    outcome = follow(client, address, submitted.submission_id).to_json()
except SubmitError as error:
    outcome = {"error": str(error)}
print(json.dumps(outcome))
"""

JOB = """
import os
import sys
import time
from pathlib import Path
import ray
import requests
from cluster.environment import FILE, apply
from cluster.local import connect
from cluster.deepspeed_ops import build_deepspeed_ops
apply()
info = connect()
print("JOINED", not info.started, sorted(path.name for path in Path.cwd().iterdir()))
print("WORD", os.environ["WORD"] == "hunter2", oct(Path(FILE).stat().st_mode))
worker = ray.get(ray.remote(lambda: (os.environ["TOKENIZERS_PARALLELISM"], os.environ["WORD"] == "hunter2")).remote())
print("WORKER", worker)
print("OPERATOR", build_deepspeed_ops()["DS_ACCELERATOR"])

def trains(metrics):
    from pipeline.training.loop import StageClock
    from pipeline.training.monitor import Monitor
    monitor = Monitor(Path("/runs/demo/training"), "first", "expert", rank=0, steps=2, rows_per_step=32)
    for step in (1, 2):
        time.sleep(0.1)
        monitor.step(step, 0.5 / step, StageClock())
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.5)
        lines = requests.get(metrics, timeout=30).text.splitlines()
        if found := sorted(line for line in lines if line.startswith("ray_pointsman_")):
            return found

print("METRICS", *ray.get(ray.remote(trains).remote(sys.argv[1])), sep="\\n")
"""


def client_of(head: Head, *words: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        words, env=head.client | environment, cwd=head.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def submitted(head: Head, name: str, *entrypoint: str, settings: str = "") -> "subprocess.Popen[str]":
    code = CLIENT.replace("JOB", repr(JOB.encode()))
    return client_of(head, sys.executable, "-c", code, head.address, name, settings, *entrypoint)


def ended(client: "subprocess.Popen[str]", head: Head) -> tuple[str, dict]:
    """Waits for a client; returns what it printed, and the outcome in its last line."""
    printed = client.communicate(timeout=2 * PATIENCE)[0]
    assert client.returncode == 0, printed
    assert head.token not in printed
    return printed, json.loads(printed.splitlines()[-1])


def headers(head: Head) -> dict[str, str]:
    return {"Authorization": f"Bearer {head.token}"}


def pointsman(head: Head, *words: str, **environment: str) -> tuple[int, str]:
    """Returns the exit code of a command, and what it printed; `{address}` in its words is the head's."""
    filled = [word.format(address=head.address) for word in words]
    command = client_of(head, sys.executable, "-m", "jobs", *filled, **environment)
    printed = command.communicate(timeout=2 * PATIENCE)[0]
    return command.returncode, printed


@pytest.fixture(scope="module")
def lasting(head: Head) -> str:
    """A job that runs until it is stopped."""
    code = "print('begun', flush=True); import time; time.sleep(600)"
    client = submitted(head, "lasts", "python", "-c", code, settings="one")
    assert client.stdout is not None
    while "begun" not in (line := client.stdout.readline()):
        assert line, "the client has ended"
    client.send_signal(signal.SIGINT)
    assert "detached; lasts goes on. Come back: pointsman jobs attach lasts" in client.communicate(timeout=PATIENCE)[0]
    return "lasts"


def test_a_job_joins_its_cluster_with_its_environment_and_its_output_appears_here(head: Head) -> None:
    printed, outcome = ended(submitted(head, "joins", "python", "job.py", head.metrics), head)
    assert outcome | {"submission_id": "joins", "status": "SUCCEEDED", "exit_code": 0} == outcome, printed
    assert "JOINED True ['.pointsman-environment.json', 'cluster', 'job.py', 'jobs', 'pipeline', 'pointsman-" in printed
    assert "WORD True 0o100600" in printed
    assert "WORKER ('false', True)" in printed
    assert "OPERATOR cpu" in printed
    assert "INFO dashboard_sdk" not in printed
    metrics = [line for line in printed.splitlines() if line.startswith("ray_pointsman_")]
    assert [line.partition("{")[0].removeprefix("ray_pointsman_") for line in metrics] == [
        "data_wait",
        "loss",
        "rows_per_second",
    ]
    assert metrics[1].endswith(" 0.25")
    assert all(tag in metrics[1] for tag in ('run="demo"', 'task="first"', 'stage="expert"', 'rank="0"'))


def test_the_environment_is_in_no_list_dashboard_or_log(head: Head) -> None:
    pages = (
        "/api/jobs/",
        "/api/v0/jobs?detail=True",
        "/api/v0/actors?detail=True",
        "/api/v0/runtime_envs",
        "/api/v0/workers?detail=True",
    )
    for page in pages:
        answer = requests.get(head.address + page, headers=headers(head), timeout=60)
        assert answer.status_code == 200, page
        assert "hunter2" not in answer.text, page
    logs = [file for file in head.logs.rglob("*") if file.is_file() and "/logs/" in str(file)]
    assert logs
    assert not [file for file in logs if "hunter2" in file.read_text(errors="replace")]


def test_exit_code_of_the_job_is_ours(head: Head) -> None:
    fails = "python", "-c", "import sys; print('a; b'); sys.exit(3)"
    killed = "python", "-c", "import os; os.kill(os.getpid(), 9)"
    clients = submitted(head, "fails", *fails), submitted(head, "killed", *killed)
    (printed, outcome), (_, of_killed) = (ended(client, head) for client in clients)
    assert (outcome["submission_id"], outcome["status"], outcome["exit_code"]) == ("fails", "FAILED", 3)
    assert "a; b" in printed
    assert "last available logs" not in outcome["message"]
    assert (of_killed["status"], of_killed["exit_code"]) == ("FAILED", 137)


def test_submitting_at_the_same_moment_is_one_job_whose_name_has_a_number_where_one_has_ended(head: Head) -> None:
    words = "python", "-c", "import time; time.sleep(4); print('done')"
    clients = [submitted(head, "fails", *words) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda client: ended(client, head), clients))
    assert [outcome["submission_id"] for _, outcome in both] == ["fails-2", "fails-2"]
    assert sorted("SUBMITTED fails-2 True" in printed for printed, _ in both) == [False, True]
    assert all("done" in printed for printed, _ in both)


def test_a_running_job_is_attached_to_unless_its_settings_differ(head: Head, lasting: str) -> None:
    client = submitted(head, "lasts", "python", "-c", "", settings="one")
    assert client.stdout is not None
    assert client.stdout.readline() == "SUBMITTED lasts True\n"
    client.kill()
    client.communicate()
    error = ended(submitted(head, "lasts", "python", "-c", "", settings="two"), head)[1]["error"]
    assert "lasts works on this run with other settings" in error


def test_jobs_are_listed_shown_and_stopped(head: Head, lasting: str) -> None:
    code, printed = pointsman(head, "jobs", "list", "--json", RAY_API_SERVER_ADDRESS=head.address)
    jobs = {job["submission_id"]: job for job in json.loads(printed)}
    assert code == 0
    assert (jobs["lasts"]["status"], jobs["lasts"]["exit_code"]) == ("RUNNING", None)
    code, printed = pointsman(head, "status", "--address", "{address}", "--output", "runs")
    assert code == 0
    assert "lasts" in printed
    assert "begun" in pointsman(head, "jobs", "logs", "last", "--address", "{address}")[1]
    code, printed = pointsman(head, "jobs", "stop", "last", "--address", "{address}")
    assert (code, printed.splitlines()[-1]) == (0, "lasts STOPPED; submitted again, the run goes on from there")
    assert pointsman(head, "jobs", "attach", "lasts", "--address", "{address}")[0] == 130
    code, printed = pointsman(head, "jobs", "logs", "nothing", "--address", "{address}")
    assert (code, "'nothing': " in printed, "has no such job; the newest: " in printed) == (2, True, True)


def test_a_mistake_that_the_job_finds_is_the_line_that_it_is_here(head: Head) -> None:
    """From a folder without a checkout, with a variable from .env."""
    stream = "stream: {tasks: [{name: first, train: rows.jsonl, eval: rows.jsonl}]}\noutput: /proc/nothing"
    (head.home / "my stream.yaml").write_text(stream)
    (head.home / "rows.jsonl").write_text('{"messages": []}\n')
    (head.home / ".env").write_text("KEY=hunter2\n")
    code, printed = pointsman(
        head, "learn", "my stream.yaml", "expert.rank=2", "--address", "{address}", "--env", "KEY"
    )
    assert code == 2, printed
    assert "MiB)\nenvironment: KEY\n" in printed
    assert "error: /proc/nothing: No such file or directory; see to it, then run the same command again" in printed
    assert "│" not in printed
    assert "hunter2" not in printed
    jobs = requests.get(f"{head.address}/api/jobs/", headers=headers(head), timeout=60).json()
    (job,) = (job for job in jobs if (job["submission_id"] or "").startswith("learn-demo-"))
    assert job["entrypoint"] == "python -m jobs learn 'my stream.yaml'"
    assert job["metadata"]["command"] == "pointsman learn 'my stream.yaml' expert.rank=2"


def test_without_the_token_the_remedy_is_named(head: Head, tmp_path: Path) -> None:
    code, printed = pointsman(head, "jobs", "list", "--address", "{address}", HOME=str(tmp_path))
    assert code == 2
    assert "refuses this user" in printed
    assert "~/.ray/auth_token" in printed


def test_no_head_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(SubmitError, match="no Ray head answers at .*connection refused"):
        connected(f"http://127.0.0.1:{free_port()}")


def test_address_must_be_the_dashboards() -> None:
    with pytest.raises(SubmitError, match="e.g. http://HOST:8265"):
        connected("ray://127.0.0.1:10001")


@pytest.fixture
def apart() -> None:
    """This process has joined no Ray: an earlier module may have left one."""
    ray.shutdown()


@pytest.mark.usefixtures("apart")
def test_drivers_do_not_join_through_ray_client() -> None:
    with pytest.raises(ClusterError, match="submit the job"):
        connect("ray://127.0.0.1:10001")


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1", "127.0.0.1:head"])
def test_no_cluster_at_the_address(address: str) -> None:
    with pytest.raises(ClusterError, match=r"cannot join.*\n.*unset RAY_ADDRESS"):
        connect(address.format(port=free_port()))
