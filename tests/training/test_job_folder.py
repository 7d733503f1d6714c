"""What a job keeps on disk, wherever its process is killed."""

from pathlib import Path

import pytest

from pipeline.training.job_folder import JobFolder


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "digits-abc")


def test_a_checkpoint_appears_whole(folder: JobFolder) -> None:
    assert folder.last() is None
    assert folder.figures() is None
    draft = folder.draft({"step": 4})
    assert folder.last() is None, "not before every rank has written its part"
    folder.commit(draft)
    assert folder.progress() == {"step": 4}
    folder.draft({"step": 8})  # killed here
    assert folder.progress() == {"step": 4}
    folder.commit(folder.draft({"step": 12}))
    assert folder.progress() == {"step": 12}


def test_between_two_checkpoints_the_one_before_counts(folder: JobFolder, monkeypatch) -> None:
    folder.commit(folder.draft({"step": 4}))
    draft = folder.draft({"step": 8})
    renamed = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self == draft:
            raise KeyboardInterrupt
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.commit(draft)
    assert folder.progress() == {"step": 4}
    monkeypatch.undo()
    folder.commit(folder.draft({"step": 8}))
    assert folder.progress() == {"step": 8}


def test_what_is_finished_needs_no_checkpoint(folder: JobFolder) -> None:
    folder.commit(folder.draft({"step": 4}))
    folder.finish({"samples": 9}, lambda draft: (draft / "expert").mkdir())
    assert folder.figures() == {"samples": 9}
    assert (folder.finished / "expert").is_dir()
    assert folder.last() is None
