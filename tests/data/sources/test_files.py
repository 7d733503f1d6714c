"""Which files a source has."""

from types import SimpleNamespace

import pytest

from pipeline.config import SourceConfig, without_secrets
from pipeline.data.errors import StreamError
from pipeline.data.sources import storage
from pipeline.data.sources.files import matches, resolve, split_glob
from pipeline.storage import remote


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def source(path, **settings) -> SourceConfig:
    return SourceConfig(path=str(path), **settings)


def names(tmp_path, path, **settings) -> list[str]:
    """Returns the files found, by their paths in `tmp_path`."""
    files = resolve(source(path, **settings), tmp_path)[1]
    return [file.path.removeprefix(f"{tmp_path}/") for file in files]


def test_a_file_a_folder_and_globs(tmp_path):
    touch(tmp_path, "b.parquet", "a.parquet", "deep/c.parquet", "deep/er/d.parquet", "notes.txt", "photo.png")
    everything = ["a.parquet", "b.parquet", "deep/c.parquet", "deep/er/d.parquet"]
    assert names(tmp_path, tmp_path / "a.parquet") == ["a.parquet"]
    assert names(tmp_path, tmp_path) == everything
    assert names(tmp_path, tmp_path / "[bc].parquet") == ["b.parquet"]
    assert names(tmp_path, tmp_path / "*.parquet") == ["a.parquet", "b.parquet"]
    assert names(tmp_path, tmp_path / "**" / "*.parquet") == everything
    assert names(tmp_path, tmp_path / "*" / "c.parquet") == ["deep/c.parquet"]
    assert names(tmp_path, tmp_path / "d*") == ["deep/c.parquet", "deep/er/d.parquet"]
    assert resolve(source(tmp_path), tmp_path)[2] == "parquet"


def test_the_shards_of_a_published_split(tmp_path):
    shards = [f"data/test-0000{n}-of-00002-49492f364babfa4{n}.parquet" for n in range(2)]
    touch(tmp_path, "data/train-00000-of-00001-e2cd0b7a0f9eb20d.parquet", *shards, "README.md", "dataset_infos.json")
    assert names(tmp_path, tmp_path / "data" / "test-*") == shards
    assert len(names(tmp_path, tmp_path)) == 3


def test_hidden_files_are_left_out(tmp_path):
    touch(tmp_path, "a.jsonl", "._a.jsonl", ".cache/b.jsonl", "_temporary/c.jsonl", "deep/.ipynb_checkpoints/d.jsonl")
    assert names(tmp_path, tmp_path) == ["a.jsonl"]
    touch(tmp_path, ".mine/a.jsonl")
    assert names(tmp_path, tmp_path / ".mine") == [".mine/a.jsonl"]


def test_wildcards_in_a_name_that_exists_are_none(tmp_path):
    touch(tmp_path, "data[1]/a.jsonl", "data1/b.jsonl")
    assert names(tmp_path, tmp_path / "data[1]") == ["data[1]/a.jsonl"]


def test_paths_may_be_relative_uris_or_have_spaces(tmp_path, monkeypatch):
    touch(tmp_path, "my data/rows.ndjson")
    monkeypatch.chdir(tmp_path)
    for path in (
        "my data",
        "my data/*.ndjson",
        "*/*",
        "./my data/rows.ndjson",
        f"file://{tmp_path}/my%20data/rows.ndjson",
    ):
        assert names(tmp_path, path) == ["my data/rows.ndjson"]
    assert resolve(source("my data"), tmp_path)[2] == "jsonl"


@pytest.mark.parametrize("file_format", ["parquet", "jsonl", "json", "tsv", "csv"])
def test_the_format_can_be_given_where_the_ending_does_not_say(tmp_path, file_format):
    touch(tmp_path, "rows.txt")
    with pytest.raises(StreamError, match=r"rows\.txt: no parquet, jsonl, json, tsv or csv files there"):
        resolve(source(tmp_path / "rows.txt"), tmp_path)
    assert resolve(source(tmp_path / "rows.txt", format=file_format), tmp_path)[2] == file_format


def test_a_given_format_chooses_among_the_files_of_a_folder(tmp_path):
    touch(tmp_path, "a.jsonl", "b.csv", "c.png")
    assert names(tmp_path, tmp_path, format="csv") == ["b.csv"]


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none" / "*.parquet", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(StreamError, match=r"no parquet, .* files there \(is the path right, and mounted here"):
            resolve(source(path), tmp_path)


def test_mixed_formats_are_refused_with_a_remedy(tmp_path):
    touch(tmp_path, "a.parquet", "b.jsonl", "c.json")
    with pytest.raises(StreamError, match=r"jsonl and parquet mixed; give a glob such as .*/\*\.parquet, or `format`"):
        resolve(source(tmp_path), tmp_path)


def test_json_files_beside_others_are_descriptions(tmp_path):
    touch(tmp_path, "dataset_info.json", "state.json", "a.parquet")
    assert names(tmp_path, tmp_path) == ["a.parquet"]
    touch(tmp_path, "llava/a.json")
    assert names(tmp_path, tmp_path / "llava") == ["llava/a.json"]
    with pytest.raises(StreamError, match="json and parquet mixed"):
        resolve(source(tmp_path / "*"), tmp_path)


def test_demo_data_are_written_where_they_are_wanted(tmp_path):
    assert names(tmp_path, "demo://successor/eval") == ["successor/eval.parquet"]
    with pytest.raises(ValueError, match="demo://sucessor/eval: no such demo data; there are: .*successor/eval"):
        resolve(source("demo://sucessor/eval"), tmp_path)


@pytest.mark.parametrize(
    ("path", "base", "pattern"),
    [
        ("/data/a.jsonl", "/data/a.jsonl", []), ("/data/*/a.jsonl", "/data", ["*", "a.jsonl"]), ("*.jsonl", ".", ["*.jsonl"]),
        ("/*.jsonl", "/", ["*.jsonl"]), ("s3://b/a/*.parquet", "s3://b/a", ["*.parquet"]),
        ("s3://b/a?region=x", "s3://b/a?region=x", []), ("s3://b/a/*?region=x", "s3://b/a?region=x", ["*"]),
    ],
)  # fmt: skip
def test_globs_are_split_from_what_comes_before(path, base, pattern):
    assert split_glob(path) == (base, pattern)


def test_two_stars_stand_for_any_folders():
    assert matches(["**", "x"], ["x"])
    assert matches(["**", "x"], ["a", "b", "x"])
    assert matches(["a*"], ["ab", "c"])
    assert not matches(["a", "b"], ["a"])
    assert not matches(["*"], [])


def test_storage_that_is_not_there_is_told(tmp_path):
    """A port where nobody listens, without the minutes of retries that a real outage takes."""
    for path, message in (("abc://b/a.jsonl", "Unrecognized filesystem"), ("file://host/a", "")):
        with pytest.raises(StreamError, match=f"cannot be read: .*{message}.*are name, region and credentials right"):
            resolve(source(path), tmp_path)


def test_keys_in_uris_are_not_told():
    assert without_secrets("s3://key:secret@bucket/a?endpoint_override=x") == "s3://bucket/a"
    assert without_secrets("/data/a?b@c") == "/data/a?b@c"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pa@ss@mlflow:5000/x", "http://mlflow:5000/x"),
        ("s3://key:se/cr+et@bucket/rows", "s3://bucket/rows"),
        ("http://mlflow:5000/#/models/base.pool@champion", "http://mlflow:5000/#/models/base.pool@champion"),
        ("cannot read 'https://h/a?X-Amz-Signature=secret&x=1': gone", "cannot read 'https://h/a': gone"),
        ("learn a.yaml registry.uri=http://u:secret@h name=x", "learn a.yaml registry.uri=http://h name=x"),
        ("url: /rows?AWSAccessKeyId=secret&sig=secret (no)", "url: /rows?AWSAccessKeyId=***&sig=*** (no)"),
        (
            "evaluation.max_new_tokens=12 router.token_scores=gaussian",
            "evaluation.max_new_tokens=12 router.token_scores=gaussian",
        ),
    ],
)
def test_secrets_go_from_texts_too(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_google_gives_up_in_time(monkeypatch):
    uris = []
    monkeypatch.setattr(remote, "fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=uris.append)))
    monkeypatch.setattr(storage, "open_filesystem", remote.open_filesystem.__wrapped__)
    for path in ("gs://b/a", "gs://b/a?anonymous=true", "gs://b/a?retry_limit_seconds=5"):
        storage.locate(path)
    assert uris == [
        "gs://b/a?retry_limit_seconds=60", "gs://b/a?anonymous=true&retry_limit_seconds=60", "gs://b/a?retry_limit_seconds=5",
    ]  # fmt: skip
