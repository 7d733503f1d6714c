"""Image folders: what they hold, and what they do not give."""

import pyarrow.fs as fs
import pytest

from pipeline.data.errors import BadRow
from pipeline.data.sources import storage
from pipeline.data.sources.storage import ImageFolder


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """A folder with a file in a folder, and a file beside it."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.png").write_bytes(b"inside")
    (tmp_path / "secret.png").write_bytes(b"outside")
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "a.png").write_bytes(b"outside")
    return ImageFolder(fs.LocalFileSystem(), str(tmp_path / "data"))


def test_paths_may_be_relative_absolute_or_uris(folder):
    for name in ("deep/a.png", "./deep//a.png", "deep/../deep/a.png", f"{folder.path}/deep/a.png"):
        assert folder.read(name) == b"inside"
    assert folder.read(f"file://{folder.path}/deep/a.png") == b"inside"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "lies outside of {path}; a folder with all images can be named as image_root"),
        ("deep/../../secret.png", "lies outside of"), ("../../../../etc/passwd", "lies outside of"),
        ("/etc/passwd", "lies outside of"), ("../database/a.png", "lies outside of"), ("", "lies outside of"),
        (".", "lies outside of"), ("file:///etc/passwd", "lies outside of"),
        ("none.png", "image file 'none.png' does not exist in {path}"), ("deep", "image file 'deep' is a folder"),
        ("deep/a.png/b", "does not exist"), ("s3://bucket/a.png", "its rows lie elsewhere than s3://"),
        ("a\x00b", "cannot be read: Embedded NUL"), ("\udce9.png", "cannot be read"), ("x" * 300 + ".png", "image file 'xxx"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_for_rows_is_refused(folder, name, message):
    with pytest.raises(BadRow) as error:
        folder.read(name)
    assert message.format(path=folder.path) in str(error.value)
    assert len(str(error.value)) < 500
    str(error.value).encode()


def test_links_are_followed(folder, tmp_path):
    """Data folders are often linked together from several disks."""
    (tmp_path / "data" / "disk").symlink_to(tmp_path / "database")
    assert folder.read("disk/a.png") == b"outside"


def test_files_too_large_for_an_image_are_not_read(folder, monkeypatch):
    monkeypatch.setattr(storage, "MAX_FILE", 3)
    with pytest.raises(BadRow, match="has 6 bytes, 3 are read at most"):
        folder.read("deep/a.png")


def test_the_whole_disk_is_a_folder_too(tmp_path, folder):
    assert ImageFolder(fs.LocalFileSystem(), "/").read(f"{folder.path}/deep/a.png") == b"inside"


def test_other_storage_is_read_in_the_same_way(tmp_path, folder):
    bucket = ImageFolder(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "data")
    assert bucket.read("deep/a.png") == b"inside"
    with pytest.raises(BadRow, match="lies outside of data"):
        bucket.read("../secret.png")
