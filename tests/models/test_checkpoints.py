"""Where bases come from: folders, URIs, files; what is refused."""

import fsspec
import pytest

from pipeline.config import BaseModelConfig
from pipeline.models import checkpoints
from pipeline.models.bases import load_base
from pipeline.models.checkpoints import BaseError, checkpoint, fingerprint


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")


@pytest.fixture
def bucket(tiny_folder):
    """A folder in an object store."""
    store = fsspec.filesystem("memory")
    store.put(str(tiny_folder), "/bucket/tiny", recursive=True)
    store.pipe("/bucket/tiny/pytorch_model.bin", b"pickled")
    yield "memory://bucket/tiny"
    store.rm("/bucket", recursive=True)


def test_a_uri_is_fetched_once(bucket, tiny_folder, tiny_base):
    folder = checkpoint(BaseModelConfig(path=bucket))
    assert fingerprint(folder) == tiny_base.fingerprint
    assert not (folder / "pytorch_model.bin").exists(), "pickled weights stay where they are"
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert checkpoint(BaseModelConfig(path=bucket + "/")) == folder
    assert weights.stat().st_mtime_ns == written
    assert load_base(BaseModelConfig(path=bucket)).label == "tiny"


def test_a_file_that_changed_is_fetched_again(bucket):
    folder = checkpoint(BaseModelConfig(path=bucket))
    fsspec.filesystem("memory").pipe("/bucket/tiny/config.json", b'{"model_type": "internvl", "more": 1}')
    assert "more" in (checkpoint(BaseModelConfig(path=bucket)) / "config.json").read_text()
    assert not list(folder.glob("*.draft"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("memory://nothing/here", "holds no checkpoint"),
        ("nowhere://bucket/base", "cannot be read: .*nowhere"),
        ("/no/such/folder", "does not exist; give a checkpoint folder, a hub id, a URI, or `tiny`"),
    ],
)
def test_what_cannot_be_found_says_so(path, said):
    with pytest.raises(BaseError, match=said):
        checkpoint(BaseModelConfig(path=path))


def test_a_filesystem_that_is_not_installed_says_what_to_install(monkeypatch):
    def missing(uri):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(checkpoints.fsspec.core, "url_to_fs", missing)
    with pytest.raises(BaseError, match=r"Install s3fs.*pip install s3fs, or gcsfs"):
        checkpoint(BaseModelConfig(path="s3://bucket/base"))


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(BaseError, match="is a file; give the checkpoint's folder, or a GGUF file"):
        checkpoint(BaseModelConfig(path=str(tmp_path / "model.bin")))
    (tmp_path / "model.gguf").write_bytes(b"no")
    with pytest.raises(BaseError, match=r"model\.gguf"):
        checkpoint(BaseModelConfig(path=str(tmp_path / "model.gguf")))


def test_a_relative_path_holds_wherever_workers_run(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    config = BaseModelConfig(path=tiny_folder.name)
    monkeypatch.chdir(tmp_path)
    assert checkpoint(config) == tiny_folder
    assert config.label == tiny_folder.name
    assert BaseModelConfig(path="tiny").path == "tiny"
