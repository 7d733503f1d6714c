"""Folders that are replaced as a whole, whenever their writer is killed."""

import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.files import atomic_folder, current_folder


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as staging:
        for part in range(3):
            (staging / str(part)).write_text(text)


def read(folder: Path) -> list[str]:
    return [(current_folder(folder) / str(part)).read_text() for part in range(3)]


def test_a_folder_is_replaced_and_nothing_is_left(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "parent" / "made", text)
        assert read(tmp_path / "parent" / "made") == [text] * 3
    assert [file.name for file in (tmp_path / "parent").iterdir()] == ["made"]


def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "made", "old")
    with pytest.raises(TypeError), atomic_folder(tmp_path / "made") as staging:
        (staging / "0").write_text(None)
    assert read(tmp_path / "made") == ["old"] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


def _killed(folder: Path, moment: int) -> None:
    """Replaces a folder; ends without a word before or after the renaming or removal of this number."""
    passed = 0

    def before_and_after(function):
        def call(*args, **settings):
            nonlocal passed
            for step in (lambda: None, lambda: function(*args, **settings)):
                step()
                passed += 1
                if passed == moment:
                    os._exit(9)

        return call

    Path.rename, shutil.rmtree = before_and_after(Path.rename), before_and_after(shutil.rmtree)
    write(folder, "new")


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    actual = []
    for moment in range(1, 100):
        folder = tmp_path / str(moment) / "made"
        write(folder, "old")
        process = get_context("fork").Process(target=_killed, args=(folder, moment))
        process.start()
        process.join()
        (text,) = set(read(folder))
        actual.append(text)
        write(folder, "newer")
        assert read(folder) == ["newer"] * 3
        assert [file.name for file in folder.parent.iterdir()] == ["made"]
        if process.exitcode != 9:
            break
    assert len(actual) > 8, "there are that many moments"
    assert actual == sorted(actual, reverse=True), "old first, then new"
    assert {"old", "new"} == set(actual)
