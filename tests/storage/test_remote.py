"""Files at an address: written, listed, read, deleted; and what is said where that does not work."""

import time
from pathlib import Path

import pytest

from jobs.benchmark.tools.s3_server import KEY, SECRET, new_bucket
from pipeline.storage.remote import RemoteFolder, StorageError, joined


def test_files_are_found_again(remote: RemoteFolder, tmp_path: Path) -> None:
    assert remote.files() == {}
    assert remote.read("a") is None
    remote.write("a", b"1")
    remote.write("deep/er/b", b"22")
    assert remote.files() == {"a": 1, "deep/er/b": 2}
    assert (remote / "deep").files() == {"er/b": 2}
    assert remote.folders() == ["deep"]
    assert (remote / "deep/er" / "../../").read("a") == b"1"
    (tmp_path / "c").write_bytes(b"333")
    remote.upload(tmp_path / "c", "a")
    assert remote.read("a") == b"333"
    remote.download("deep/er/b", tmp_path / "made" / "b")
    assert (tmp_path / "made" / "b").read_bytes() == b"22"
    remote.delete(["a", "never"])
    assert remote.files() == {"deep/er/b": 2}
    remote.delete_all()
    assert remote.files() == {}
    assert remote.folders() == []


def test_folders_are_copied_with_one_file_last(remote: RemoteFolder, tmp_path: Path, monkeypatch) -> None:
    for name in ("a", "z", "deep/b"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(name)
    order = []
    upload = RemoteFolder.upload

    def noted(self: RemoteFolder, source: Path, name: str) -> None:
        upload(self, source, name)
        order.append(name)

    monkeypatch.setattr(RemoteFolder, "upload", noted)
    remote.upload_folder(tmp_path / "here", last="a")
    assert sorted(order) == ["a", "deep/b", "z"]
    assert order[-1] == "a"
    remote.download_folder(tmp_path / "again", wanted=lambda name: name != "z")
    assert sorted(p.name for p in (tmp_path / "again").rglob("*") if p.is_file()) == ["a", "b"]


def test_a_place_is_checked_and_left_as_it_was(remote: RemoteFolder) -> None:
    remote.check()
    assert remote.files() == {}


def test_names_keep_an_addresss_options() -> None:
    assert joined("s3://k:s@b/runs/?region=x", "demo/pool") == "s3://k:s@b/runs/demo/pool?region=x"
    assert joined("s3://b/runs/demo/pool", "../../experts") == "s3://b/runs/experts"


def test_keys_are_not_shown() -> None:
    folder = RemoteFolder("s3://key:secret@bucket/runs?endpoint_override=x")
    assert str(folder / "demo") == "s3://bucket/runs/demo"
    assert "secret" not in repr(folder)


def test_what_lies_beside_it_is_not_reached_by_an_address(s3: tuple[str, str]) -> None:
    """`runs#old/probe` would be `runs`: what is deleted after a check would be all of it."""
    for address in ("s3://bucket/runs#old", "s3://bucket/a/../../other"):
        with pytest.raises(StorageError, match=f"^{address}: "):
            RemoteFolder(address)
    folder = RemoteFolder(f"s3://{KEY}:{SECRET}@{new_bucket(s3[0])}/my%20runs/%C3%BC%23{s3[1]}")
    folder.check()
    (folder / "demo").write("a", b"1")
    assert folder.path.endswith("/my runs/ü#")
    assert folder.files() == {"demo/a": 1}
    (folder / "demo").delete_all()
    assert folder.files() == {}


def test_a_missing_bucket_is_told_in_one_line(s3: tuple[str, str]) -> None:
    with pytest.raises(StorageError, match=r"^s3://nobody/runs: there is no such bucket; make it, or correct") as error:
        RemoteFolder(f"s3://{KEY}:{SECRET}@nobody/runs{s3[1]}").check()
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_there_is_told() -> None:
    began = time.monotonic()
    folder = RemoteFolder(f"s3://{KEY}:{SECRET}@bucket/runs?endpoint_override=127.0.0.1:9&scheme=http&region=x")
    with pytest.raises(StorageError, match=r"^s3://bucket/runs: it does not answer; are its address .* right") as error:
        folder.check()
    assert SECRET not in str(error.value)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied"),
            "this may not be done there",
        ),
        (PermissionError("Forbidden"), "this may not be done there"),
        (OSError("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2"), "the credentials are not accepted"),
        (OSError("AWS Error SIGNATURE_DOES_NOT_MATCH: ?"), "the credentials are not accepted"),
        (OSError("Unable to locate credentials"), "there are no credentials here"),
        (
            ImportError("Install adlfs to access Azure Datalake"),
            "the package for this kind of storage is not installed",
        ),
        (
            OSError("Unexpected query parameter in S3 URI: 'zone'"),
            "it has an option that such storage does not know; correct it",
        ),
        (
            OSError("AWS Error SLOW_DOWN during PutObject operation"),
            "it is asked too much at the moment; the same command",
        ),
        (NotImplementedError(), "this kind of storage cannot do what is needed of it; choose another one"),
        (OSError("something else"), "cannot be used: something else"),
    ],
)
def test_what_storage_says_gets_a_meaning(reason: Exception, said: str, monkeypatch) -> None:
    def refuse(self: RemoteFolder) -> None:
        raise reason

    monkeypatch.setattr("pipeline.storage.remote.open_filesystem", refuse)
    with pytest.raises(StorageError, match=f"^s3://bucket/runs: {said}"):
        RemoteFolder("s3://bucket/runs").files()


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(StorageError, match=r"^gdrive://x/y: the package .* not installed: .*gdrive"):
        RemoteFolder("gdrive://x/y").files()


def test_what_fails_in_the_middle_is_not_there(remote: RemoteFolder, tmp_path: Path, monkeypatch) -> None:
    """A download that ends early leaves no file."""
    remote.write("a", b"1")
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(StorageError, match="cut off"):
        remote.download("a", tmp_path / "a")
    assert not list(tmp_path.glob("*a*"))


def test_buckets_are_apart(s3: tuple[str, str]) -> None:
    one, two = (RemoteFolder(f"s3://{KEY}:{SECRET}@{new_bucket(s3[0])}/x{s3[1]}") for _ in range(2))
    one.write("a", b"1")
    assert two.files() == {}
