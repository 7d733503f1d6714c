"""Where bases come from: folders, URIs, files; what is refused."""

import hashlib
import json
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import fsspec
import pytest

from pipeline.config import BaseModelConfig
from pipeline.models import checkpoints
from pipeline.models.bases import load_base
from pipeline.models.checkpoints import BaseError, checkpoint, files_of, fingerprint


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
    assert not list(folder.parent.glob("*.staging.*"))


def test_a_file_of_the_same_size_that_changed_is_fetched_again(bucket):
    checkpoint(BaseModelConfig(path=bucket))
    store = fsspec.filesystem("memory")
    changed = store.cat("/bucket/tiny/config.json").replace(b'"internvl"', b'"internvm"')
    store.pipe("/bucket/tiny/config.json", changed)
    assert (checkpoint(BaseModelConfig(path=bucket)) / "config.json").read_bytes() == changed


def test_a_shard_that_is_gone_there_is_gone_here(bucket, tiny_base):
    store = fsspec.filesystem("memory")
    store.copy("/bucket/tiny/model.safetensors", "/bucket/tiny/model-00001-of-00002.safetensors")
    checkpoint(BaseModelConfig(path=bucket))
    store.rm("/bucket/tiny/model-00001-of-00002.safetensors")
    assert fingerprint(checkpoint(BaseModelConfig(path=bucket))) == tiny_base.fingerprint


def _fingerprint_of(uri):
    return fingerprint(checkpoint(BaseModelConfig(path=uri)))


def test_several_processes_on_a_machine_fetch_one_copy(tiny_folder, tiny_base, tmp_path, monkeypatch):
    cache = tmp_path / "shared"
    name = hashlib.sha256(tiny_folder.as_uri().encode()).hexdigest()[:16]
    left = cache / f"{name}.staging.{socket.gethostname()}.killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    monkeypatch.setattr(checkpoints, "CACHE", cache)
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        started = [pool.submit(_fingerprint_of, tiny_folder.as_uri()) for _ in range(4)]
        assert {answer.result(timeout=60) for answer in started} == {tiny_base.fingerprint}
    assert not list(cache.glob("*.staging.*"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://nothing/here", "holds no checkpoint"),
        ("nowhere://bucket/base", "cannot be read: .*nowhere"),
        ("/no/such/folder", "does not exist; give a checkpoint folder, a hub id, a URI, or `tiny`"),
    ],
)
def test_what_cannot_be_found_says_so(path, message):
    with pytest.raises(BaseError, match=message):
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


@pytest.fixture
def copied(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copied")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("chat_template.jinja", "<|end|>", "<|END|>"),
        ("tokenizer.json", '"unk_token"', '"unk_t0ken"'),
        ("tokenizer_config.json", "<|end|>", "<unk>"),
        ("processor_config.json", "64", "32"),
        ("config.json", '"hidden_size"', '"hidden_s"'),
    ],
)
def test_every_file_that_changes_answers_changes_the_fingerprint(copied, tiny_base, name, before, after):
    text = (copied / name).read_text()
    assert before in text
    (copied / name).write_text(text.replace(before, after))
    assert fingerprint(copied) != tiny_base.fingerprint


def test_what_says_nothing_of_answers_does_not(copied, tiny_base):
    for name in ("README.md", "LICENSE.txt", "pretraining.json", "model.safetensors.index.json"):
        (copied / name).write_text("{}")
    settings = json.loads((copied / "config.json").read_text())
    settings |= {"transformers_version": "9.9", "_name_or_path": "/elsewhere"}
    (copied / "config.json").write_text(json.dumps(settings))
    assert fingerprint(copied) == tiny_base.fingerprint


def test_what_a_registry_hands_out_is_the_same_base(copied, tiny_base, tmp_path):
    (tmp_path / "registered").mkdir()
    for file in files_of(copied):
        shutil.copy(file, tmp_path / "registered")
    assert fingerprint(tmp_path / "registered") == tiny_base.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor_config.json", b'{"image'),
        ("tokenizer.json", b""),
        ("config.json", b"\xff\xfe"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    ],
)
def test_a_damaged_file_is_named(copied, name, content):
    (copied / name).write_bytes(content)
    with pytest.raises(BaseError, match=rf"{name}: damaged.*copy or download the base again"):
        fingerprint(copied)


def test_weights_that_were_cut_off_are_named(copied):
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BaseError, match=r"model\.safetensors: damaged"):
        fingerprint(copied)
