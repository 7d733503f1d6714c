import os
import shutil
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from pipeline.config import LearnConfig, RegistryConfig, StreamConfig, TaskConfig
from pipeline.registry import retries
from pipeline.registry.addresses import database_path, ui_command
from pipeline.registry.metric_buffer import MetricBuffer
from pipeline.registry.retries import RegistryError
from pipeline.registry.tracking import (
    active_run,
    log_batch,
    log_config,
    log_dataset,
    open_tracking,
    tracked_run,
)
from tests.registry.conftest import Created

SECRET = "hunter2"


def test_the_artifact_location_is_absolute_and_beside_the_database(experiment: str, tmp_path: Path) -> None:
    assert MlflowClient().get_experiment(experiment).artifact_location == (tmp_path / "store/mlartifacts").as_uri()
    assert (tmp_path / "store/mlflow.db").is_file()


def test_opening_again_finds_the_same_experiment(experiment: str, tmp_path: Path) -> None:
    assert open_tracking(f"sqlite:///{tmp_path}/store/mlflow.db", "pointsman") == experiment


def test_a_relative_database_is_resolved_where_the_driver_runs(
    created: Created, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(created.path, tmp_path / "here.db")
    monkeypatch.chdir(tmp_path)
    open_tracking("sqlite:///here.db", "pointsman")
    assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path}/here.db"


def test_making_a_database_is_quiet(created: Created) -> None:
    assert created.printed == ""


def test_other_stores_are_refused_with_the_field_name() -> None:
    with pytest.raises(RegistryError, match=r"registry\.uri: 'mlruns'"):
        open_tracking("mlruns", "pointsman")


@pytest.mark.parametrize("head", [b"not a database at all", b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_database_is_named_with_the_remedy(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(head)
    with pytest.raises(RegistryError, match=r"registry\.uri: .*mlflow\.db is .*damaged.*move it away"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db", "pointsman")


def test_a_database_of_another_mlflow_says_so(created: Created, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copyfile(created.path, file)
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
    database.close()
    with pytest.raises(RegistryError, match=r"registry\.uri: .*mlflow\.db was written by another MLflow"):
        open_tracking(f"sqlite:///{file}", "pointsman")


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=rf"registry\.uri: .* names a folder; .*{tmp_path}/mlflow\.db"):
        open_tracking(f"sqlite:///{tmp_path}", "pointsman")
    with pytest.raises(RegistryError, match=r"registry\.uri: .* names no file; .*sqlite:///mlflow\.db"):
        open_tracking("sqlite:///", "pointsman")


@pytest.mark.parametrize("uri", [f"http://u:{SECRET}@", "http://mlflow:five", "http://mlflow:99999", "http://[::1"])
def test_an_address_without_host_or_with_a_port_that_is_none_is_refused(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"registry\.uri: .*http://mlflow\.example\.com:5000") as error:
        database_path(uri)
    assert SECRET not in str(error.value)


def test_a_user_without_a_password_takes_it_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setattr(retries, "CHECK_SECONDS", 0.0)
    before = mlflow.get_tracking_uri()
    try:
        with pytest.raises(RegistryError, match="set MLFLOW_TRACKING_PASSWORD"):
            open_tracking("http://me@127.0.0.1:9", "pointsman")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        with pytest.raises(RegistryError, match="does not answer"):
            open_tracking("http://me@127.0.0.1:9", "pointsman")
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", SECRET)
    finally:
        mlflow.set_tracking_uri(before)


def test_a_signal_while_a_run_is_opened_leaves_none_running(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run = mlflow.start_run

    def interrupted(**settings: object) -> None:
        start_run(**settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "start_run", interrupted)
    with pytest.raises(KeyboardInterrupt), tracked_run(experiment, "demo", "abc"):
        pass
    (run,) = MlflowClient().search_runs([experiment])
    assert run.info.status == "KILLED"


def test_a_damaged_file_of_metrics_ends_no_start(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'\xff\xfe\x00\n["run", "loss", "high", 1, 2]\n7\n["run", "loss", 0.5, 1, 2]\n["run", "lo\xc3')
    assert MetricBuffer(file, print).waiting == 1


def test_a_deleted_experiment_is_named_with_the_remedy(experiment: str, tmp_path: Path) -> None:
    MlflowClient().delete_experiment(experiment)
    with pytest.raises(RegistryError, match="mlflow experiments restore"):
        open_tracking(f"sqlite:///{tmp_path}/store/mlflow.db", "pointsman")


def test_a_restarted_job_continues_its_run(experiment: str) -> None:
    with pytest.raises(KeyboardInterrupt), tracked_run(experiment, "demo", "abc") as first:
        raise KeyboardInterrupt
    assert MlflowClient().get_run(first).info.status == "KILLED"
    with tracked_run(experiment, "demo", "abc") as second:
        assert active_run().info.run_id == second == first
    with tracked_run(experiment, "demo", "other") as third:
        assert third != first
    assert MlflowClient().get_run(first).info.status == "FINISHED"
    assert len(MlflowClient().search_runs([experiment])) == 2


def test_system_metrics_are_recorded_on_request(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    runs = {}
    for wanted in (True, False):
        with tracked_run(experiment, "demo", str(wanted), system_metrics=wanted) as runs[wanted]:
            time.sleep(1.0)
    metrics = {wanted: MlflowClient().get_run(run).data.metrics for wanted, run in runs.items()}
    assert "system/system_memory_usage_megabytes" in metrics[True]
    assert metrics[False] == {}


def test_registering_outside_of_a_run_is_an_error(experiment: str) -> None:
    with pytest.raises(RegistryError, match="tracked_run"):
        active_run()


def test_what_runs_are_compared_by_are_parameters_and_the_rest_is_a_file(experiment: str) -> None:
    tasks = [{"name": f"task_{number}", "train": "t.jsonl", "eval": "e.jsonl"} for number in range(100)]
    config = LearnConfig.model_validate({"stream": {"tasks": tasks}})
    with tracked_run(experiment, "demo", "abc") as run:
        log_config(run, config)
        log_config(run, config.model_copy(update={"seed": 7}))
    params = MlflowClient().get_run(run).data.params
    assert len(params) < 60
    assert (params["stream.tasks"], params["expert.rank"], params["seed"]) == ("100", "8", "0")
    whole = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run}/config.yaml"))
    assert LearnConfig.model_validate(whole) == config.model_copy(update={"seed": 7})


def test_many_points_are_logged_in_batches(experiment: str) -> None:
    with tracked_run(experiment, "demo", "abc") as run:
        log_batch(run, [("digits/expert_loss", 1 / (step + 1), step) for step in range(1500)])
    history = MlflowClient().get_metric_history(run, "digits/expert_loss")
    assert [point.step for point in history] == list(range(1500))


def test_data_lineage_is_recorded_once(experiment: str) -> None:
    with tracked_run(experiment, "demo", "abc") as run:
        for _ in range(2):
            log_dataset(run, "digits", "demo://digits/train", "f" * 64, samples=100)
    (entry,) = MlflowClient().get_run(run).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest, entry.dataset.source_type) == ("digits", "f" * 36, "demo")
    assert "demo://digits/train" in entry.dataset.source


def test_first_runs_at_once_make_one_database(tmp_path: Path) -> None:
    """One migrates, the others wait; all find the same experiment."""
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        started = [pool.submit(open_tracking, f"sqlite:///{tmp_path}/mlflow.db", "pointsman") for _ in range(3)]
        assert len({process.result(timeout=120) for process in started}) == 1


def test_no_secret_of_a_configuration_reaches_the_registry(experiment: str, tmp_path: Path) -> None:
    key = f"s3://AKIA:{SECRET}/x@bucket/rows.jsonl?token={SECRET}"
    task = TaskConfig.model_validate({"name": "digits", "train": key, "eval": key})
    config = LearnConfig(
        stream=StreamConfig(tasks=(task,)), registry=RegistryConfig(uri=f"http://me:{SECRET}@mlflow:5000")
    )
    with tracked_run(experiment, "demo", "abc") as run:
        log_config(run, config)
        log_dataset(run, "digits", key, "f" * 64, samples=100)
    whole = mlflow.artifacts.load_text(f"runs:/{run}/config.yaml")
    assert "uri: http://mlflow:5000" in whole
    assert SECRET not in whole
    assert SECRET.encode() not in (tmp_path / "store/mlflow.db").read_bytes()


def test_a_servers_user_and_password_leave_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    monkeypatch.setattr(retries, "CHECK_SECONDS", 0.0)
    before = mlflow.get_tracking_uri()
    try:
        with pytest.raises(RegistryError) as error:
            open_tracking(f"http://me:{SECRET}%40@127.0.0.1:9", "pointsman")
        assert mlflow.get_tracking_uri() == "http://127.0.0.1:9"
    finally:
        mlflow.set_tracking_uri(before)
    assert SECRET not in str(error.value)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == f"{SECRET}@"


def test_the_command_for_the_browser(tmp_path: Path) -> None:
    command = ui_command(f"sqlite:///{tmp_path}/a b.db")
    assert command[:4] == ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{tmp_path}/a b.db"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    pytest.importorskip("psycopg")
    assert ui_command(f"postgresql://me:{SECRET}@db/mlflow")[:3] == ["mlflow", "ui", "--host"], "no password to be read"
