"""What a job keeps on disk, wherever its process is killed."""

from pathlib import Path

import pytest

from pipeline.training.training_folder import TrainingFolder


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
