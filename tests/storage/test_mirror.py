"""What lies here and at an address: what is new goes there, what is missing comes here, whenever a process is killed."""

import shutil
from pathlib import Path

import pyarrow.fs as fs
import pytest

from pipeline.storage.mirror import Mirror, RunMirror, SharedFiles, made_at, made_by_all
from pipeline.storage.remote import RemoteFolder

APART = ("training", "claims")


def run_mirror(machine: Path, remote: RemoteFolder) -> RunMirror:
    mirror = RunMirror(Mirror(machine, remote), apart=APART)
    mirror.begin()
    return mirror


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def texts(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def test_another_machine_goes_on_where_one_ended(remote: RemoteFolder, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    mirror = run_mirror(one, remote)
    put(one, state__task_json="1", pool__pool_json="p", training__big="x", run="r", pool_json="q")
    put(one, **{"run.lock": "me", "pool.staging__half": "h", ".hidden": "h"})
    mirror.push()
    assert set(remote.files()) == {"mirror.json", "state/task.json", "pool/pool.json", "run", "pool.json"}
    second = run_mirror(two, remote)
    assert texts(two) == {"state/task.json": "1", "pool/pool.json": "p", "run": "r", "pool.json": "q"}
    put(two, state__task_json="2", state__more_json="3")
    (two / "run").unlink()
    second.push()
    assert "run" not in remote.files()
    run_mirror(one, remote)  # what it had is older now
    assert {"state/task.json": "2", "state/more.json": "3"}.items() <= texts(one).items()
    assert "run" not in texts(one)
    assert texts(one)["training/big"] == "x", "others' files stay"


def test_the_same_machine_keeps_what_it_had_not_copied_yet(remote: RemoteFolder, tmp_path: Path) -> None:
    mirror = run_mirror(tmp_path, remote)
    put(tmp_path, state__a_json="1")
    mirror.push()
    put(tmp_path, state__a_json="2", state__b_json="3")  # killed here
    again = run_mirror(tmp_path, remote)
    assert texts(tmp_path) == {"state/a.json": "2", "state/b.json": "3"}
    again.push()
    assert remote.read("state/a.json") == b"2"
    assert remote.read("state/b.json") == b"3"


def test_what_was_deleted_at_the_address_does_not_come_back(remote: RemoteFolder, tmp_path: Path) -> None:
    mirror = run_mirror(tmp_path, remote)
    put(tmp_path, state__a_json="1")
    mirror.push()
    remote.delete_all()
    run_mirror(tmp_path, remote).push()
    assert texts(tmp_path) == {}
    assert set(remote.files()) == {"mirror.json"}


def test_clearing_the_cache_deletes_nothing_at_the_address(remote: RemoteFolder, tmp_path: Path) -> None:
    mirror = run_mirror(tmp_path / "run", remote)
    put(tmp_path / "run", a="1")
    mirror.push()
    shutil.rmtree(tmp_path / "run")
    mirror.push()
    assert remote.read("a") == b"1"


def test_only_what_is_new_is_copied(remote: RemoteFolder, tmp_path: Path, monkeypatch) -> None:
    mirror = run_mirror(tmp_path, remote)
    put(tmp_path, a="1", b="1")
    mirror.push()
    copied = []
    monkeypatch.setattr(RemoteFolder, "upload", lambda self, source, name: copied.append(name))
    mirror.push()
    assert copied == []
    put(tmp_path, b="22")
    mirror.push()
    assert copied == ["b"]


@pytest.mark.parametrize("steps", range(8))
def test_killed_at_any_step_it_can_go_on(steps: int, remote: RemoteFolder, tmp_path: Path, monkeypatch) -> None:
    """A pool's card is there only with its files, a summary only with its report, and the next session ends as one that was not
    killed."""
    one, two = tmp_path / "one", tmp_path / "two"
    left = steps
    write = RemoteFolder._writing

    def mortal(self: RemoteFolder, name: str):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return write(self, name)

    files = {"pool__pool_json": "p", "pool__null": "n", "state__a_json": "a", "report.html": "r", "summary_json": "s"}
    monkeypatch.setattr(RemoteFolder, "_writing", mortal)
    try:
        mirror = run_mirror(one, remote)
        put(one, **files)
        mirror.push()
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    there = set(remote.files())
    assert "pool/pool.json" not in there or "pool/null" in there
    assert "summary.json" not in there or {"report.html", "state/a.json", "pool/pool.json"} <= there
    for machine in (one, two):
        mirror = run_mirror(machine, remote)
        put(machine, **files)
        mirror.push()
    assert set(remote.files()) == {
        "mirror.json",
        "pool/pool.json",
        "pool/null",
        "state/a.json",
        "report.html",
        "summary.json",
    }


def test_files_of_all_runs_are_shared(remote: RemoteFolder, tmp_path: Path) -> None:
    one, two = (SharedFiles(Mirror(tmp_path / name, remote)) for name in ("one", "two"))
    one.pull("base")
    put(tmp_path / "one", base__a="1", base__b="2", **{"base__compact.lock": "me", "base__.half": "h"})
    one.push()
    assert set(remote.files()) == {"base/a", "base/b"}
    two.pull("base")
    assert texts(tmp_path / "two") == {"base/a": "1", "base/b": "2"}
    put(tmp_path / "two", base__ab="12")
    for name in "ab":
        (tmp_path / "two" / "base" / name).unlink()  # compacted
    two.push()
    assert set(remote.files()) == {"base/ab"}
    one.push()
    assert set(remote.files()) == {"base/ab"}, "what it has copied before does not come back"


def test_what_nobody_asks_for_is_neither_fetched_nor_deleted(remote: RemoteFolder, tmp_path: Path, monkeypatch) -> None:
    for name in ("base/a", "expert/b", "table", "table2"):
        remote.write(name, b"1")
    shared, listed = SharedFiles(Mirror(tmp_path, remote)), []
    files = RemoteFolder.files
    monkeypatch.setattr(RemoteFolder, "files", lambda folder: listed.append(folder) or files(folder))
    put(tmp_path, others="of another run")
    shared.pull("table")
    shared.pull("base")
    shared.pull("nothing")
    put(tmp_path, nothing="2")
    shared.push()
    assert len(listed) == 1
    assert texts(tmp_path) == {"base/a": "1", "table": "1", "nothing": "2", "others": "of another run"}
    assert set(remote.files()) == {"base/a", "expert/b", "table", "table2", "nothing"}


def test_a_cleared_cache_deletes_nothing_at_the_address(remote: RemoteFolder, tmp_path: Path) -> None:
    shared = SharedFiles(Mirror(tmp_path / "one", remote))
    shared.pull("base")
    put(tmp_path / "one", base__a="1")
    shared.push()
    (tmp_path / "one" / "base" / "a").unlink()
    (tmp_path / "one" / "base").rmdir()
    shared.push()
    assert set(remote.files()) == {"base/a"}


@pytest.mark.parametrize("at_address", [False, True])
def test_a_folder_is_made_by_all_once(at_address: bool, remote: RemoteFolder, tmp_path: Path) -> None:
    folder = Mirror(tmp_path / "features", remote if at_address else None)
    made = []

    def make(filesystem: fs.FileSystem, path: str) -> None:
        made.append(path)
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/part") as file:
            file.write(b"1")

    assert made_at(folder, "_SUCCESS") is None
    filesystem, path = made_by_all(folder, make, mark="_SUCCESS", why="")
    assert filesystem.get_file_info(f"{path}/part").size == 1
    assert made_by_all(folder, make, mark="_SUCCESS", why="")[1] == path
    assert len(made) == 1
    assert made_at(folder, "_SUCCESS")[1] == path


def test_what_is_missing_here_is_fetched(remote: RemoteFolder, tmp_path: Path) -> None:
    here, there = Mirror(tmp_path / "one", remote), Mirror(tmp_path / "two", remote)
    put(tmp_path / "one", given__a="1", file="2")
    here.share("given")
    here.share("file")
    assert there.fetched("file").read_text() == "2"
    assert texts(there.fetched("given")) == {"a": "1"}
    assert not there.fetched("nothing").exists()
    with there.on_this_node() as own:
        assert own.local != there.local
        assert own.local.name == "two"
        assert texts(own.fetched("given")) == {"a": "1"}
    assert not own.local.exists()
    with Mirror(tmp_path).on_this_node() as same:
        assert same.local == tmp_path
