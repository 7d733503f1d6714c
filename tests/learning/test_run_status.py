import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.learning.progress import LoggedProgress
from pipeline.learning.run_status import FILE, LOCK, RecordedProgress, StatusFile, runs_below, status_of
from pipeline.locks import file_lock, is_held
from pipeline.training.telemetry import Step


def status_file(folder: Path) -> StatusFile:
    return StatusFile(folder, name=folder.name, job="learn", tasks=["first", "second"])


def test_a_run_says_what_it_does_and_how_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with file_lock(folder / LOCK), status_file(folder) as file:
        progress = RecordedProgress(LoggedProgress(), file)
        with progress.training("second") as stage:
            stage.update([Step("second", "expert", 7, 20, 0.5)])
            file._write("running")
            status = status_of(folder)
            assert status is not None
            assert (status.state, status.job) == ("running", "learn")
            assert status.progress == "task 2/2, second: expert stage 7/20, loss 0.500"
            assert f"process {os.getpid()}" in status.where
        with progress.working("sweeping second") as tell:
            tell("3 of 20 trials")
            file._write("running")
            status = status_of(folder)
            assert status is not None
            assert status.progress == "sweeping second: 3 of 20 trials"
    (status,) = runs_below(tmp_path)
    assert (status.state, status.progress, status.tasks) == ("finished", "", 2)


@pytest.mark.parametrize(
    ("error", "state", "progress"),
    [
        (KeyboardInterrupt(), "stopped", "reading"),
        (SystemExit(1), "failed", "SystemExit(1)"),  # output that nobody reads any more ends a process so
        (ValueError("base.path: gone, token=x\nmore"), "failed", "base.path: gone, token=***"),
    ],
)
def test_ends(tmp_path: Path, error: BaseException, state: str, progress: str) -> None:
    with (
        pytest.raises(type(error)),
        status_file(tmp_path / "demo") as file,
        RecordedProgress(LoggedProgress(), file).working("reading"),
    ):
        raise error
    (status,) = runs_below(tmp_path)
    assert (status.state, status.progress) == (state, progress)


def test_a_killed_run_is_told_from_one_that_works(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    with file_lock(folder / LOCK):
        file = status_file(folder)
        file._write("running")
        assert is_held(folder / LOCK)
        holder = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(holder | {"pid": 2**22 - 1}))  # what a killed process leaves
    (status,) = runs_below(tmp_path)
    assert status.state == "killed"
    (folder / LOCK).write_text(
        json.dumps(holder | {"since": "2020-01-01T00:00:00+00:00"})
    )  # another one has its number
    assert not is_held(folder / LOCK)
    (folder / LOCK).write_text(json.dumps(holder | {"host": "elsewhere"}))
    (folder / FILE).write_text((folder / FILE).read_text().replace(holder["host"], "elsewhere"))
    elsewhere = status_of(folder)
    assert elsewhere is not None
    assert elsewhere.state == "running", "its file was written a moment ago"


@pytest.mark.parametrize(("minutes", "state"), [(-1, "running"), (1, "running"), (-10, "silent"), (10, "silent")])
def test_of_a_run_on_another_machine_its_own_clock_tells_no_more_than_it_can(
    tmp_path: Path, minutes: int, state: str
) -> None:
    folder = tmp_path / "demo"
    with file_lock(folder / LOCK):
        status_file(folder)._write("running")
        holder = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(holder | {"host": "elsewhere"}))
    noted = json.loads((folder / FILE).read_text())
    said = datetime.now(UTC) + timedelta(minutes=minutes)
    (folder / FILE).write_text(json.dumps(noted | {"host": "elsewhere", "updated": said.isoformat()}))
    (status,) = runs_below(tmp_path)
    assert status.state == state
    assert status.where.startswith("elsewhere, process ")
    assert ("killed, unless its clock is wrong" in status.where) == (state == "silent")


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text('{"name": "demo", "started": "2026-01-01T00:00:00+00:00"}')
    (status,) = runs_below(tmp_path)
    assert (status.name, status.state, status.job) == ("old", "finished", "demo")
    assert runs_below(tmp_path / "nowhere") == []
