"""What a job keeps on disk, wherever its process is killed."""

from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.storage.mirror import Mirror
from pipeline.storage.remote import RemoteFolder
from pipeline.training.training_folder import TrainingFolder, training_folder
from pipeline.training.validation import BestAdapter, ValidationPoint


@pytest.fixture
def folder(tmp_path: Path) -> TrainingFolder:
    return TrainingFolder(tmp_path / "digits-abc")


def test_a_checkpoint_appears_whole(folder: TrainingFolder) -> None:
    assert folder.last() is None
    assert folder.metrics() is None
    checkpoint_dir = folder.checkpoint_dir({"step": 4})
    assert folder.last() is None, "not before every rank has written its part"
    folder.commit(checkpoint_dir)
    assert folder.progress() == {"step": 4}
    folder.checkpoint_dir({"step": 8})  # killed here
    assert folder.progress() == {"step": 4}
    folder.commit(folder.checkpoint_dir({"step": 12}))
    assert folder.progress() == {"step": 12}


def test_between_two_checkpoints_the_one_before_counts(folder: TrainingFolder, monkeypatch) -> None:
    folder.commit(folder.checkpoint_dir({"step": 4}))
    checkpoint_dir = folder.checkpoint_dir({"step": 8})
    renamed = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == checkpoint_dir:
            raise KeyboardInterrupt
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.commit(checkpoint_dir)
    assert folder.progress() == {"step": 4}
    monkeypatch.undo()
    folder.commit(folder.checkpoint_dir({"step": 8}))
    assert folder.progress() == {"step": 8}


def test_what_is_finished_needs_no_checkpoint(folder: TrainingFolder) -> None:
    folder.commit(folder.checkpoint_dir({"step": 4}))
    folder.finish({"samples": 9}, lambda checkpoint_dir: (checkpoint_dir / "expert").mkdir())
    assert folder.metrics() == {"samples": 9}
    assert (folder.finished / "expert").is_dir()
    assert folder.last() is None


@pytest.fixture
def remote(tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(f"local://{tmp_path}/there")


def on_node(tmp_path: Path, remote: RemoteFolder, node: str, rank: int = 0) -> TrainingFolder:
    """The training's folder in a process of a node that shares no file system with others."""
    return training_folder(Mirror(tmp_path / node, remote), "digits", "abc", rank)


def written(folder: TrainingFolder, step: int) -> Path:
    checkpoint_dir = folder.checkpoint_dir({"step": step, "seconds": step / 2})
    (checkpoint_dir / f"random-{step}").write_text(str(step))
    return checkpoint_dir


def test_a_process_on_another_node_goes_on_at_the_last_checkpoint(tmp_path: Path, remote: RemoteFolder) -> None:
    one, two = (on_node(tmp_path, remote, node) for node in ("one", "two"))
    one.fetch()
    assert one.last() is None
    one.commit(written(one, 4))
    written(one, 8)  # killed here
    assert two.seconds() == 2
    two.fetch()
    assert two.progress()["step"] == 4
    two.commit(written(two, 8))
    one.fetch()
    assert one.progress()["step"] == 8
    assert [p.name for p in one.path.rglob("random-*")] == ["random-8"]
    assert len((remote / "digits-abc").folders()) == 1, "the one before is gone there"


@pytest.mark.parametrize("writes", range(4))
def test_killed_in_an_upload_the_checkpoint_before_counts(
    writes: int, tmp_path: Path, remote: RemoteFolder, monkeypatch
) -> None:
    """A checkpoint is two files and its pointer: it counts from the last of these on."""
    one, two = (on_node(tmp_path, remote, node) for node in ("one", "two"))
    one.commit(written(one, 4))
    left, write = writes, RemoteFolder._writing

    def mortal(self: RemoteFolder, name: str):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return write(self, name)

    monkeypatch.setattr(RemoteFolder, "_writing", mortal)
    with suppress(KeyboardInterrupt):
        one.commit(written(one, 8))
    monkeypatch.undo()
    two.fetch()
    assert two.progress()["step"] == (8 if writes == 3 else 4)
    two.commit(written(two, 12))
    one.fetch()
    assert one.progress()["step"] == 12


def test_what_is_finished_is_found_by_the_driver(tmp_path: Path, remote: RemoteFolder) -> None:
    worker, driver = on_node(tmp_path, remote, "worker"), on_node(tmp_path, remote, "driver")
    assert driver.metrics() is None
    worker.commit(written(worker, 4))
    best = worker.path / "best-4"
    best.mkdir()
    (best / "validation.json").write_text("{}")
    worker.keep(best)
    worker.finish({"samples": 9}, lambda folder: (folder / "expert").write_text("e"))
    worker.forget()
    assert not worker.path.exists()
    assert driver.metrics() == {"samples": 9}
    assert (driver.finished / "expert").read_text() == "e"
    assert set(remote.files()) == {"digits-abc/finished/expert", "digits-abc/finished/figures.json"}


def test_the_best_adapter_comes_along(tmp_path: Path, remote: RemoteFolder) -> None:
    one, two = (on_node(tmp_path, remote, node) for node in ("one", "two"))
    best = BestAdapter(one.path, write=True, keep=one.keep)
    for step, loss in ((4, 2.0), (8, 1.0), (12, 3.0)):
        best.offer(ValidationPoint(step, loss), lambda folder: (folder / "adapter").write_text(folder.name))
    two.fetch()
    again = BestAdapter(two.path, write=True)
    assert again.point == ValidationPoint(8, 1.0)
    again.copy(tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter").read_text() == "best-8"
    assert {name.split("/")[1] for name in remote.files()} == {"best-8"}
