"""Rows of a source, read without starting Ray; on Ray: see `test_malformed`."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import ColumnsConfig, SourceConfig
from pipeline.data.errors import StreamError, UnreadableRow
from pipeline.data.rows.records import BadRow
from pipeline.data.sources import reader
from pipeline.data.sources.raw_row import NUMBER, PATH, RAW, ROOT, RawRow
from pipeline.data.sources.reader import count_rows, fingerprint, first_records


def row(number: int) -> dict:
    messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": str(number)}]
    return {"id": f"row{number}", "messages": messages}


def write_jsonl(file, numbers, end="\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row(n)) for n in numbers) + end)
    return file


def write_json(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row(n) for n in numbers]))
    return file


def write_parquet(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(n) for n in numbers]), file)
    return file


def source(path, **settings) -> SourceConfig:
    return SourceConfig(path=str(path), **settings)


def raw(content, path="/data/rows.jsonl", number=7, root="") -> dict:
    """A raw row as reading makes it."""
    return {PATH: str(path), NUMBER: number, ROOT: root, RAW: reader.packed_row(content)}


def tasks(config: SourceConfig, folder, parallelism: int) -> list[list[dict]]:
    """Returns the rows of each task that Ray would run."""
    read_tasks = reader._Rows(config, folder).get_read_tasks(parallelism)
    return [[entry for block in task() for entry in block.to_pylist()] for task in read_tasks]


def test_every_file_is_read_by_one_task(tmp_path):
    for name, count in (("a", 2), ("b", 0), ("c", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", range(count), end="" if count == 0 else "\n")
    for parallelism, sizes in ((9, [2, 0, 3]), (2, [2, 3]), (1, [5])):
        assert [len(rows) for rows in tasks(source(tmp_path), tmp_path, parallelism)] == sizes
    (rows,) = tasks(source(tmp_path), tmp_path, 1)
    assert [(Path(r[PATH]).name, r[NUMBER]) for r in rows] == [("a.jsonl", 1), ("a.jsonl", 2)] + [
        ("c.jsonl", n) for n in (1, 2, 3)
    ]


def test_a_limit_always_takes_the_same_rows(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", range(3))
    ((*rows,),) = tasks(source(tmp_path, limit=4), tmp_path, 9)
    assert [r[PATH][-7:] for r in rows] == ["a.jsonl"] * 3 + ["b.jsonl"]


def test_blocks_are_small(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", range(300))
    (task,) = reader._Rows(source(tmp_path), tmp_path).get_read_tasks(1)
    assert [len(block) for block in task()] == [256, 44]
    monkeypatch.setattr(reader, "_BLOCK_BYTES", 1)
    assert len(list(task())) == 301  # the last one is empty


def test_files_may_differ_in_their_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(1))
    pq.write_table(pa.table({"id": [5], "text": ["x"], "messages": ["[]"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"other": [5]}), tmp_path / "c.parquet")
    (rows,) = tasks(source(tmp_path), tmp_path, 1)
    assert RawRow.of(rows[0]).record(source(tmp_path), "{question}").id == "row0"
    for entry, message in zip(
        rows[1:], ("no message of the user", "column 'messages' is missing or null"), strict=True
    ):
        with pytest.raises(BadRow, match=message):
            RawRow.of(entry).record(source(tmp_path), "{question}")


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_small_files_are_counted(tmp_path, end):
    write_jsonl(tmp_path / "a.jsonl", range(5), end)
    write_jsonl(tmp_path / "b.jsonl", range(3), end)
    assert count_rows(source(tmp_path), tmp_path) == 8
    assert count_rows(source(tmp_path, limit=6), tmp_path) == 6


@pytest.mark.parametrize("write", [write_jsonl, write_json])
def test_the_rows_of_large_texts_are_guessed_by_their_beginning(tmp_path, write):
    file = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", range(5000))
    assert 4000 < count_rows(source(file), tmp_path) < 6500


def test_rows_of_parquet_come_from_the_metadata(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(5))
    write_parquet(tmp_path / "b.parquet", range(4))
    assert count_rows(source(tmp_path), tmp_path) == 9
    assert count_rows(source(tmp_path, limit=2), tmp_path) == 2
    (tmp_path / "c.parquet").write_bytes(b"cut")
    assert count_rows(source(tmp_path), tmp_path) == 10


def test_some_of_many_files_speak_for_all(tmp_path):
    for number in range(150):
        write_parquet(tmp_path / f"{number:03}.parquet", range(5))
    assert count_rows(source(tmp_path), tmp_path) == pytest.approx(750, rel=0.02)


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    one, other = (write_jsonl(tmp_path / folder / "rows.jsonl", range(3)) for folder in ("one", "other"))
    first = fingerprint(source(one), tmp_path)
    assert len(first) == 16
    os.utime(other, (1, 1))
    assert fingerprint(source(other), tmp_path) == first
    assert fingerprint(source(one.parent), tmp_path) == first


def test_the_fingerprint_changes_with_contents_and_reading(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", range(3))
    settings = (
        {},
        {"limit": 2},
        {"columns": ColumnsConfig(id="number")},
        {"preset": "docvqa"},
        {"image_root": "/images"},
    )
    fingerprints = [fingerprint(source(file, **more), tmp_path) for more in settings]
    file.write_text(file.read_text().replace("say 1", "say 2"))
    fingerprints.append(fingerprint(source(file), tmp_path))
    write_jsonl(tmp_path / "more.jsonl", range(1))
    fingerprints.append(fingerprint(source(tmp_path), tmp_path))
    assert len(set(fingerprints)) == 7


def test_damaged_files_have_fingerprints_too(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    assert fingerprint(source(tmp_path), tmp_path)


def test_files_that_may_not_be_read_are_told(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", range(1))
    resolved = reader.resolve(source(file), tmp_path)
    file.unlink()
    monkeypatch.setattr(reader, "resolve", lambda *args: resolved)
    with pytest.raises(StreamError, match=r"a\.jsonl: cannot be read: .*No such file"):
        fingerprint(source(file), tmp_path)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_json])
def test_first_records_are_read_here_and_now(tmp_path, write):
    file = write(tmp_path / f"rows.{write.__name__.removeprefix('write_')}", range(9))
    records = list(first_records(source(file), tmp_path, "{question} .", 4))
    assert [record.id for record in records] == ["row0", "row1", "row2", "row3"]
    assert records[3].question == "say 3 ."
    assert len(list(first_records(source(file), tmp_path, "{question}", 20))) == 9


def test_first_records_pass_over_bad_rows_and_empty_files(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", range(4))
    (tmp_path / "before.jsonl").write_text("")
    file.write_text("nonsense\n" + file.read_text())
    assert [r.id for r in first_records(source(tmp_path), tmp_path, "{question}", 2)] == ["row0", "row1"]


def test_first_records_of_demo_data_have_images(tmp_path):
    (record,) = first_records(source("demo://shape/eval"), tmp_path, "{question}", 1)
    assert record.id == "shape-eval-00000"
    assert record.images[0].size == (64, 64)


def test_a_fault_is_a_bad_row(tmp_path):
    bad = raw(UnreadableRow("not valid JSON: Expecting value", "nonsense"))
    with pytest.raises(BadRow, match="not valid JSON: Expecting value"):
        RawRow.of(bad).record(source(tmp_path), "{question}")
    assert (RawRow.of(bad).id(source(tmp_path)), RawRow.of(bad).excerpt) == ("rows.jsonl#7", "nonsense")


def test_a_row_without_an_id_is_named_by_file_and_number(tmp_path):
    for content in ({"messages": row(1)["messages"]}, {"messages": row(1)["messages"], "id": None}):
        assert RawRow.of(raw(content)).record(source(tmp_path), "{question}").id == "rows.jsonl#7"
        assert RawRow.of(raw(content)).id(source(tmp_path)) == "rows.jsonl#7"
    assert RawRow.of(raw(row(3))).id(source(tmp_path)) == "row3"


def test_what_is_nested_too_deeply_for_a_row_is_a_fault(tmp_path):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRow, match="nested too deeply"):
        RawRow.of(raw({"id": deep})).record(source(tmp_path), "{question}")
    while deep:  # Python's own clean-up would recurse
        deep = deep.pop()


def test_image_paths_count_from_the_rows_file(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "red.png")
    entry = raw(row(1) | {"images": ["red.png"]}, tmp_path / "rows.parquet")
    assert RawRow.of(entry).record(source(tmp_path), "{question}").images[0].size == (5, 4)


def test_image_paths_count_from_the_root_where_one_is_given(tmp_path, monkeypatch):
    (tmp_path / "images" / "coco").mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(tmp_path / "images" / "coco" / "red.png")
    file = write_jsonl(tmp_path / "rows" / "a.jsonl", [])
    file.write_text(json.dumps(row(1) | {"image": "coco/red.png"}))
    monkeypatch.chdir(tmp_path)
    for root in ("images", tmp_path / "images", f"file://{tmp_path}/images"):
        (record,) = first_records(source(file, image_root=str(root)), tmp_path, "{question}", 1)
        assert record.images[0].size == (5, 4)
    assert list(first_records(source(file), tmp_path, "{question}", 1)) == []


def test_an_image_folder_with_metadata(tmp_path):
    """As the hub's image folders: a table that names the files beside it."""
    Image.new("RGB", (5, 4)).save(tmp_path / "0001.png")
    for name, text in (
        ("metadata.csv", "file_name,label\n0001.png,boot\n"),
        ("metadata.jsonl", '{"file_name": "0001.png", "label": "boot"}\n'),
    ):
        (tmp_path / name).write_text(text)
        columns = ColumnsConfig(id="file_name", images="file_name", answer="label")
        (record,) = first_records(source(tmp_path, columns=columns), tmp_path, "what is it ?{question}", 9)
        assert (record.id, record.reference.answers, record.question) == ("0001.png", ("boot",), "what is it ?")
        assert record.images[0].size == (5, 4)
        (tmp_path / name).unlink()


def test_rows_of_a_layout_have_an_image(tmp_path):
    with pytest.raises(BadRow, match="column 'image' is missing or null; every row of preset docvqa has an image"):
        RawRow.of(raw({"question": "what ?", "answers": ["red"]})).record(
            source(tmp_path, preset="docvqa"), "{question}"
        )


def test_an_excerpt_shows_the_beginning_of_a_row():
    assert RawRow.of(raw({"id": 1, "images": [b"\x00" * 999]})).excerpt == '{"id": 1, "images": ["<999 bytes>"]}'
    long = RawRow.of(raw({"text": "x" * 10_000_000, "more": [["\udce9"] * 9] * 9_000})).excerpt
    assert long == '{"text": "' + "x" * 290
    assert RawRow.of(raw({"text": "\udce9"})).excerpt == '{"text": "?"}'
    assert RawRow.of(raw({"a": [[[[[[5]]]]]]})).excerpt == '{"a": [[["..."]]]}'
