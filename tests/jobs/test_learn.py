"""The main job as a user runs it: a process of its own, killed, resumed, run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.learning.opening import alone_in
from pipeline.learning.run_status import status_of
from pipeline.registry.loading import download_pool
from pipeline.registry.promotion import champion
from pipeline.registry.scores import scores_of
from pipeline.registry.versions import get_version
from pipeline.routing.pool import Pool

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


def stream(tiny_folder: Path, output: Path) -> Path:
    """Writes a stream of two tasks that takes seconds to learn; one has a bad row."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "id": f"r{n}",
                "messages": [
                    {"role": "user", "content": f"echo {n % 10}"},
                    {"role": "assistant", "content": str(n % 10)},
                ],
            }
        )
        for n in range(79)
    ]
    (output / "echo.jsonl").write_text("\n".join([*lines, "not a row"]) + "\n")
    config = {
        "name": "mini",
        "output": str(output),
        "base": {"path": str(tiny_folder), "name": "untrained"},
        "stream": {
            "tasks": [
                {
                    "name": "digits",
                    "train": {"path": "demo://digits/train", "limit": 64},
                    "eval": {"path": "demo://digits/eval", "limit": 16},
                },
                {
                    "name": "echo",
                    "train": str(output / "echo.jsonl"),
                    "eval": {"path": "demo://successor/eval", "limit": 16},
                },
            ],
            "benchmarks": [{"name": "repeat", "eval": {"path": "demo://repeat/eval", "limit": 16}}],
            "base_prompts": {"path": "demo://general/train", "limit": 64},
        },
        "expert": {"steps": 12, "batch_size": 16, "rank": 4},
        "router": {"steps": 4},
        "training": {"cpus_per_worker": 1, "checkpoint_every": 4},
        "evaluation": {"max_new_tokens": 2},
    }
    file = output / "mini.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.learn", str(config), *overrides]
    log = (config.parent / "log.txt").open("a")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(config: Path, *overrides: str) -> dict:
    process = start(config, *overrides)
    assert process.wait(timeout=400) == 0, (config.parent / "log.txt").read_text()[-3000:]
    return summary_of(config)


def learn_here(config: Path, *overrides: str) -> str:
    """Runs the job in this process, which starts sooner; returns what it prints."""
    outcome = CliRunner().invoke(app, ["learn", str(config), *overrides])
    assert outcome.exit_code == 0, outcome.output[-3000:]
    return outcome.output


def summary_of(config: Path) -> dict:
    return json.loads((config.parent / "mini" / "summary.json").read_text())


def kill_when(process: subprocess.Popen, ready, by: signal.Signals = signal.SIGKILL) -> int:
    """Ends the driver, and it alone, as soon as `ready()`; returns its exit code."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, by)
    return process.wait(timeout=60)


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory):
    config = stream(tiny_folder, tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTSMAN_LOG", "json")
        return config, finish(config)


def versions(config: Path, model: str, database: str = "mlflow.db") -> list[str]:
    client = MlflowClient(f"sqlite:///{config.parent / database}")
    return sorted(str(v.version) for v in client.search_model_versions(f"name = '{model}'"))


def test_summary_and_registry(undisturbed):
    config, summary = undisturbed
    assert set(summary["tasks"]) == {"digits", "echo"}
    assert summary["tasks"]["echo"]["quarantined"] == 1
    assert summary["tasks"]["echo"]["lost_files"] == 0
    assert len(summary["accuracy_matrix"]["values"]) == 3
    assert summary["peak_memory_bytes"] > 0
    assert 0 <= summary["data_wait_share"] < 1
    assert (summary["answers"]["prompts"], summary["answers"]["single_pass"]) == (48, 80)
    assert 48 < summary["answers"]["generated"] <= 3 * 48  # prompts whose expert changed are answered again
    assert versions(config, "untrained.expert.digits") == versions(config, "untrained.expert.echo") == ["1"]
    assert versions(config, "untrained.pool.mini") == ["1", "2"]
    assert (config.parent / "mini" / "report.html").exists()
    client = MlflowClient(f"sqlite:///{config.parent / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert len(client.get_metric_history(run.info.run_id, "digits/expert_loss")) == 12
    assert len(client.get_metric_history(run.info.run_id, "digits/router_loss")) == 4


def test_logs_are_json_where_they_are_asked_for(undisturbed):
    config, _ = undisturbed
    lines = [json.loads(line) for line in (config.parent / "log.txt").read_text().splitlines() if line[:1] == "{"]
    assert {line["run"] for line in lines} == {"mini"}
    stages = {(line["task"], line["stage"], line["steps"]) for line in lines if "stage" in line}
    assert stages == {
        (task, stage, steps) for task in ("digits", "echo") for stage, steps in (("expert", 12), ("router", 4))
    }


def test_the_registry_says_how_good_versions_are_and_which_is_in_use(undisturbed, monkeypatch):
    config, summary = undisturbed
    uri = f"sqlite:///{config.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    version = champion("untrained.pool.mini")
    assert int(version.version) == 2
    assert set(version.tags) <= {"tasks", "accuracy", "base_kept", "status"}
    assert version.tags["status"].startswith("promoted ")
    accuracy = summary["accuracy_matrix"]["values"][-1]
    assert [score.accuracy for score in scores_of(version)] == accuracy
    for words in ("| [echo](#/models/untrained.expert.echo/versions/1)", "Sample prompts:", "**Promotion:** promoted "):
        assert words in version.description
    expert = get_version("untrained.expert.echo", 1)
    assert expert.tags == {"rank": "4", "rows": "79", "status": "evaluated", "accuracy": f"{accuracy[1]:.3f}"}
    assert "Sample prompts:" in expert.description
    before = get_version("untrained.pool.mini", 1)
    assert (before.tags["status"], before.aliases) == ("evaluated", [])


def expert_folder(config: Path, task: str) -> Path:
    """Where a task's expert lies: all runs of an output folder share them."""
    known = json.loads((config.parent / "mini" / "state" / f"expert-{task}.json").read_text())
    return config.parent / "experts" / known["config_digest"]


def test_pools_refer_to_experts(undisturbed):
    """Neither the run's folder nor the registered version holds their weights again."""
    config, _ = undisturbed
    run = config.parent / "mini"
    assert sorted(p.name for p in (run / "pool").iterdir()) == ["null.safetensors", "pool.json"]
    assert not (run / "experts").exists()
    references = Pool.load(run / "pool").card.experts
    assert [(r.name, r.model, r.version) for r in references] == [
        ("digits", "untrained.expert.digits", 1),
        ("echo", "untrained.expert.echo", 1),
    ]
    mlflow.set_tracking_uri(f"sqlite:///{config.parent / 'mlflow.db'}")
    folder = download_pool("models:/untrained.pool.mini/2", config.parent / "fetched")
    assert Pool.load(folder).card.experts == references
    assert not list(folder.rglob("adapter_model.safetensors"))


def test_a_finished_run_changes_nothing(undisturbed):
    config, summary = undisturbed
    weights = expert_folder(config, "digits") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # damaged: the registry has it still
    (config.parent / "echo.jsonl").rename(config.parent / "gone.jsonl")  # what was learned from it is learned
    learn_here(config, "training.zero_stage=2", "training.micro_batch=4", "training.workers=2")
    (config.parent / "gone.jsonl").rename(config.parent / "echo.jsonl")
    assert weights.read_bytes() == whole
    after = summary_of(config)
    assert all(after[key] == summary[key] for key in ("accuracy_matrix", "tasks", "answers"))
    assert versions(config, "untrained.expert.digits") == versions(config, "untrained.expert.echo") == ["1"]
    assert versions(config, "untrained.pool.mini") == ["1", "2"]


def test_what_another_run_has_registered_is_not_learned_again(undisturbed, tmp_path):
    """Nothing but the registry is shared."""
    config, summary = undisturbed
    registry = f"registry.uri=sqlite:///{config.parent / 'mlflow.db'}"
    assert "digits: another run has learned it" in learn_here(config, registry, f"output={tmp_path}", "name=colleague")
    assert not (tmp_path / "colleague" / "training").exists()
    actual = json.loads((tmp_path / "colleague" / "summary.json").read_text())
    assert actual["accuracy_matrix"] == summary["accuracy_matrix"]
    assert actual["tasks"]["echo"]["samples"] == summary["tasks"]["echo"]["samples"]
    assert versions(config, "untrained.expert.digits") == versions(config, "untrained.expert.echo") == ["1"]


def test_what_the_registry_does_not_have_is_only_registered(undisturbed):
    """As after a registry that was away at the end of training: nothing is trained again.

    One expert lies where an earlier release put it, in the run's folder, and is taken over.
    """
    config, summary = undisturbed
    shutil.copyfile(config.parent / "mlflow.db", config.parent / "other.db")
    other = MlflowClient(f"sqlite:///{config.parent / 'other.db'}")
    for model in ("untrained.expert.digits", "untrained.expert.echo", "untrained.pool.mini"):
        other.delete_registered_model(model)
    shutil.rmtree(config.parent / "mini" / "training")
    folder, earlier = expert_folder(config, "echo"), config.parent / "mini" / "experts" / "echo"
    whole = (folder / "adapter_model.safetensors").read_bytes()
    earlier.parent.mkdir()
    folder.rename(earlier)
    (earlier / "contents.json").unlink()
    with (config.parent / "mini" / "state" / "metrics.jsonl").open("a") as spool:  # as of a server that was away
        run = other.search_runs(["1"])[0]
        spool.write(json.dumps([run.info.run_id, "digits/late", 0.5, 1, 1000]))
    learn_here(config, f"registry.uri=sqlite:///{config.parent / 'other.db'}")
    assert summary_of(config)["tasks"] == summary["tasks"]
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    assert versions(config, "untrained.expert.echo", "other.db") == ["1"]
    assert versions(config, "untrained.pool.mini", "other.db") == ["1", "2"]
    assert not (config.parent / "mini" / "training").exists()
    assert [point.value for point in other.get_metric_history(run.info.run_id, "digits/late")] == [0.5]


def test_an_identical_run_at_once_is_told_who_runs(tmp_path):
    with alone_in(tmp_path / "mini"):
        answer = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from pipeline.learning.opening import *\nwith alone_in(Path({str(tmp_path / 'mini')!r})): pass",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert f"BusyError: {tmp_path}/mini: process {os.getpid()} on " in answer.stderr
    assert "wait for its end, or give this one a `name` of its own" in answer.stderr
    with alone_in(tmp_path / "mini"):
        pass


def statuses(config: Path) -> list[str]:
    return [r.info.status for r in MlflowClient(f"sqlite:///{config.parent / 'mlflow.db'}").search_runs(["1"])]


def test_stopped_and_killed_drivers_go_on_to_the_same_pool(undisturbed, tiny_folder, tmp_path):
    config = stream(tiny_folder, tmp_path / "killed")
    training, log = config.parent / "mini" / "training", config.parent / "log.txt"
    # `ray job stop` in the middle of the first task's training, a kill once the task was registered.
    stopped = kill_when(
        start(config), lambda: any(training.glob("digits-*/checkpoint/progress.json")), by=signal.SIGTERM
    )
    assert stopped == 143
    assert status_of(config.parent / "mini").state == "stopped"
    assert statuses(config) == ["KILLED"]
    kill_when(start(config), lambda: any((config.parent / "mini" / "state").glob("task-*.json")))
    assert statuses(config) == ["RUNNING"]
    assert status_of(config.parent / "mini").state == "killed"
    finish(config, "training.parallel_tasks=2")
    assert statuses(config) == ["FINISHED"]
    assert status_of(config.parent / "mini").state == "finished"
    assert_whole_curves(config)
    summary = json.loads((config.parent / "mini" / "summary.json").read_text())
    assert all(
        task.get("overhead_seconds", 1) > 0 for task in summary["tasks"].values()
    )  # digits was noted, then killed
    assert log.read_text().count("the same command goes on from there") == 1
    assert "Traceback" not in log.read_text()
    assert_same_pool(Pool.load(config.parent / "mini" / "pool"), Pool.load(undisturbed[0].parent / "mini" / "pool"))
    assert versions(config, "untrained.pool.mini") == ["1", "2"]


def assert_whole_curves(config: Path) -> None:
    """Every step has its loss in MLflow once, whatever was killed in between."""
    client = MlflowClient(f"sqlite:///{config.parent / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    for task in ("digits", "echo"):
        history = client.get_metric_history(run.info.run_id, f"{task}/expert_loss")
        assert sorted(point.step for point in history) == list(range(1, 13))
    assert len(client.get_metric_history(run.info.run_id, "continual/average_accuracy")) == 1


def assert_same_pool(one: Pool, other: Pool) -> None:
    assert one.names == other.names
    for name, expert in one.experts.items():
        twin = other.experts[name]
        for path, adapter in expert.adapters.items():
            assert adapter.b_OR.equal(twin.adapters[path].b_OR)
            assert expert.vectors[path].equal(twin.vectors[path])
        assert expert.statistics.mean_F.equal(twin.statistics.mean_F)


def test_a_wrong_field_teaches(tiny_folder, tmp_path):
    config = stream(tiny_folder, tmp_path)
    answer = subprocess.run(
        [sys.executable, "-m", "jobs.learn", str(config), "expert.rnak=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert "did you mean `expert.rank`?" in answer.stderr
