"""Files of all sorts, read without starting Ray."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ColumnsConfig, SourceConfig
from pipeline.streams.records import BadRow
from pipeline.streams.sources import (
    LINE,
    PATH,
    StreamError,
    count_rows,
    excerpt,
    fingerprint,
    first_records,
    record_of,
    resolve,
)


def row(number: int) -> dict:
    messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": str(number)}]
    return {"id": f"row{number}", "messages": messages}


def write_jsonl(file, numbers, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row(n)) for n in numbers) + end)
    return file


def write_parquet(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(n) for n in numbers]), file)
    return file


def source(path, **settings) -> SourceConfig:
    return SourceConfig(path=str(path), **settings)


def names(found) -> list[str]:
    return [file.base_name for file in found[1]]


def test_a_file_a_folder_and_a_glob(tmp_path):
    for name in ("b", "a", "deep/c"):
        write_parquet(tmp_path / f"{name}.parquet", range(2))
    (tmp_path / "notes.txt").write_text("not data")
    assert names(resolve(source(tmp_path / "a.parquet"), tmp_path)) == ["a.parquet"]
    assert names(resolve(source(tmp_path), tmp_path)) == ["a.parquet", "b.parquet", "c.parquet"]
    assert names(resolve(source(tmp_path / "[bc].parquet"), tmp_path)) == ["b.parquet", "c.parquet"]
    assert resolve(source(tmp_path), tmp_path)[2] == "parquet"


def test_paths_may_be_relative_uris_or_have_spaces(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "my data" / "rows.ndjson", range(2))
    monkeypatch.chdir(tmp_path)
    for path in ("my data", "my data/*.ndjson", file, f"file://{tmp_path}/my%20data/rows.ndjson"):
        found = resolve(source(path), tmp_path)
        assert (names(found), found[2]) == (["rows.ndjson"], "jsonl")


def test_the_format_can_be_given_where_the_ending_does_not_say(tmp_path):
    file = write_jsonl(tmp_path / "rows.txt", range(3))
    with pytest.raises(StreamError, match=r"rows\.txt: no parquet or jsonl files there"):
        resolve(source(file), tmp_path)
    assert resolve(source(file, format="jsonl"), tmp_path)[2] == "jsonl"
    assert count_rows(source(file, format="jsonl"), tmp_path) in (3, 4)


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none" / "*.parquet", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(StreamError, match=r"no parquet or jsonl files there \(is the path right, and mounted here"):
            resolve(source(path), tmp_path)


def test_mixed_formats_are_refused_with_a_remedy(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(2))
    write_jsonl(tmp_path / "b.jsonl", range(2))
    with pytest.raises(StreamError, match=r"parquet and jsonl mixed; give a glob such as .*/\*\.parquet"):
        resolve(source(tmp_path), tmp_path)


def test_embedded_data_are_written_where_they_are_wanted(tmp_path):
    found = resolve(source("embedded://successor/eval"), tmp_path)
    assert [file.path for file in found[1]] == [str(tmp_path / "successor" / "eval.parquet")]
    assert count_rows(source("embedded://successor/eval"), tmp_path) == 200
    with pytest.raises(
        ValueError, match=r"embedded://sucessor/eval: no such embedded data; there are: .*successor/eval"
    ):
        resolve(source("embedded://sucessor/eval"), tmp_path)


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_rows_of_jsonl_are_counted_never_too_low(tmp_path, end):
    """At most one a file too many, since a last line may lack its end."""
    write_jsonl(tmp_path / "a.jsonl", range(5), end)
    write_jsonl(tmp_path / "b.jsonl", range(3), end)
    assert 8 <= count_rows(source(tmp_path), tmp_path) <= 10
    assert count_rows(source(tmp_path, limit=6), tmp_path) == 6


def test_long_lines_are_counted_once(tmp_path):
    """Longer than the blocks in which files are read."""
    (tmp_path / "a.jsonl").write_text(("x" * (5 << 20) + "\n") * 2)
    assert 2 <= count_rows(source(tmp_path), tmp_path) <= 3


def test_rows_of_parquet_come_from_the_metadata(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(5))
    write_parquet(tmp_path / "b.parquet", range(4))
    assert count_rows(source(tmp_path), tmp_path) == 9
    assert count_rows(source(tmp_path, limit=2), tmp_path) == 2


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    one, other = (write_jsonl(tmp_path / folder / "rows.jsonl", range(3)) for folder in ("one", "other"))
    first = fingerprint(source(one), tmp_path)
    assert len(first) == 16
    os.utime(other, (1, 1))
    assert fingerprint(source(other), tmp_path) == first
    assert fingerprint(source(one.parent), tmp_path) == first


def test_the_fingerprint_changes_with_contents_and_reading(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", range(3))
    found = [fingerprint(source(file), tmp_path), fingerprint(source(file, limit=2), tmp_path)]
    found.append(fingerprint(source(file, columns=ColumnsConfig(id="number")), tmp_path))
    file.write_text(file.read_text().replace("say 1", "say 2"))
    found.append(fingerprint(source(file), tmp_path))
    write_jsonl(tmp_path / "more.jsonl", range(1))
    found.append(fingerprint(source(tmp_path), tmp_path))
    assert len(set(found)) == 5


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_first_records_are_read_here_and_now(tmp_path, write):
    file = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}", range(9))
    found = list(first_records(source(file), tmp_path, "{question} .", 4))
    assert [record.id for record in found] == ["row0", "row1", "row2", "row3"]
    assert found[3].question == "say 3 ."
    assert len(list(first_records(source(file), tmp_path, "{question}", 20))) == 9


def test_first_records_pass_over_bad_rows(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", range(4))
    file.write_text("nonsense\n" + file.read_text())
    assert [r.id for r in first_records(source(file), tmp_path, "{question}", 2)] == ["row0", "row1"]


def test_first_records_of_embedded_data_have_images(tmp_path):
    (record,) = first_records(source("embedded://shape/eval"), tmp_path, "{question}", 1)
    assert record.id == "shape-eval-00000"
    assert record.images[0].size == (64, 64)


def test_a_line_stays_text_until_it_is_needed(tmp_path):
    raw = {LINE: json.dumps(row(3)), PATH: str(tmp_path / "rows.jsonl")}
    assert record_of(raw, source(tmp_path), "{question}").id == "row3"
    with pytest.raises(BadRow, match="not valid JSON"):
        record_of(raw | {LINE: "{"}, source(tmp_path), "{question}")


def test_a_row_without_an_id_is_named_by_file_and_content(tmp_path):
    def name(number: int) -> str:
        line = json.dumps({"messages": row(number)["messages"]})
        return record_of({LINE: line, PATH: "/data/rows.jsonl"}, source(tmp_path), "{question}").id

    assert name(1).startswith("rows.jsonl#")
    assert name(1) == name(1) != name(2)


def test_image_paths_count_from_the_rows_file(tmp_path):
    from PIL import Image

    Image.new("RGB", (5, 4)).save(tmp_path / "red.png")
    raw = row(1) | {"images": ["red.png"], PATH: str(tmp_path / "rows.parquet")}
    assert record_of(raw, source(tmp_path), "{question}").images[0].size == (5, 4)


def test_an_excerpt_shows_the_beginning_of_a_row():
    assert excerpt({LINE: "x" * 900, PATH: "p"}) == "x" * 300
    assert excerpt({"id": 1, "images": [b"\x00" * 999]}) == '{"id": 1, "images": ["<bytes>"]}'
