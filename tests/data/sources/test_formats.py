"""Rows of single files, whole and damaged, in every format."""

import bz2
import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest

from pipeline.data.errors import StreamError, UnreadableRow
from pipeline.data.sources import formats
from pipeline.data.sources.formats import format_of, rows_of

LOCAL = fs.LocalFileSystem()
WANTED = frozenset({"id", "text"})


def row(number: int) -> dict:
    return {"id": number, "text": f"say {number}"}


def lines(count: int) -> bytes:
    return b"".join(json.dumps(row(n)).encode() + b"\n" for n in range(count))


def read(path, file_format=None) -> list:
    return list(rows_of(LOCAL, str(path), file_format or format_of(str(path)), WANTED))


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def reason_of(rows) -> str:
    """Returns the reason of the only fault."""
    (only,) = [row for _, row in rows if isinstance(row, UnreadableRow)]
    return only.reason


def lost(rows: list) -> tuple[str, int]:
    """What of a file is lost by its only fault, and rows that stand there."""
    (only,) = [row for _, row in rows if isinstance(row, UnreadableRow)]
    return only.lost, only.rows


@pytest.mark.parametrize(
    ("path", "file_format"),
    [
        ("a.parquet", "parquet"), ("data/train-00000-of-00005-49492f364babfa44.parquet", "parquet"), ("a.JSONL", "jsonl"),
        ("a.ndjson", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.json.zst", "json"), ("a.tsv", "tsv"), ("b.v1.csv", "csv"),
        ("a.txt", ""), ("a", ""), ("a.gz", ""), ("jsonl", ""), ("a.parquet.crc", ""),
    ],
)  # fmt: skip
def test_the_ending_says_the_format(path, file_format):
    assert format_of(path) == file_format


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    data = b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r\n\r\n  \n\xef\xbb\xbf" + lines(1) + b'{"id": 9}'
    assert read(write(tmp_path / "a.jsonl", data)) == [(1, row(0)), (4, row(0)), (5, {"id": 9})]


def test_an_empty_file_of_lines_has_no_rows(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b"")) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "not valid JSON"), (b"[1, 2]", "a row must be a JSON object, found list"), (b"5", "found int"),
        (b"\x00\x00\x00", "is it UTF-16"), (b'{"id": 1', "not valid JSON"), (b"[" * 99_999, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_bad_line_costs_itself(tmp_path, line, message):
    rows = read(write(tmp_path / "a.jsonl", lines(2) + line + b"\n" + lines(1)))
    assert message in reason_of(rows)
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert rows[2][1].excerpt.startswith(line[:5].decode())


def test_bytes_that_are_not_utf8_pass_for_those_who_do_not_use_them(tmp_path):
    ((_, values),) = read(write(tmp_path / "a.jsonl", b'{"id": 1, "note": "caf\xe9", "text": "x"}\n'))
    assert (values["text"], values["note"].encode("utf-8", "surrogateescape")) == ("x", b"caf\xe9")


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 100)
    rows = read(write(tmp_path / "a.jsonl", lines(1) + b'{"id": "' + b"x" * 950 + b'"}\n' + lines(1)))
    assert "a line of more than 100 characters" in reason_of(rows)
    assert [number for number, _ in rows] == [1, 2, 3]


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_texts(tmp_path, ending, compress):
    expected = [(n + 1, row(n)) for n in range(3)]
    assert read(write(tmp_path / f"a.jsonl{ending}", compress(lines(3)))) == expected
    array = json.dumps([row(n) for n in range(3)]).encode()
    assert read(write(tmp_path / f"a.json{ending}", compress(array))) == expected


def test_a_damaged_archive_is_read_as_far_as_it_goes(tmp_path):
    rows = read(write(tmp_path / "a.jsonl.gz", gzip.compress(lines(50_000))[:-2000]))
    assert [entry for _, entry in rows[:100]] == [row(n) for n in range(100)]
    assert f"a.jsonl.gz: the file cannot be read beyond its row {len(rows) - 1}: Truncated" in reason_of(rows)
    assert lost(rows) == (f"all rows beyond row {len(rows) - 1}", 0)
    nothing = read(write(tmp_path / "b.jsonl.gz", b"no archive"))
    assert "cannot be read at all" in reason_of(nothing)
    assert lost(nothing) == ("the whole file", 0)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", lines(2) + b'{"id": 3, "text": "te', ("all rows beyond row 3", 1)),
        ("a.jsonl", lines(2) + b'{"id": 3,', ("all rows beyond row 3", 1)),
        ("a.jsonl", lines(2) + b'{"id": 3, "text": "te\n', ("", 1)),  # the line has its end: broken, not cut
        ("a.jsonl", lines(2) + b"nonsense", ("", 1)),  # no beginning of a row either
        ("a.json", b'[{"id": 1}, {"id": 2}', ("all rows beyond row 2", 0)),
        ("a.json", b'[{"id": 1}, {"id": 2', ("all rows beyond row 2", 1)),
        ("a.json", b'[{"id": 1}, {"id": "t"wo"}\n]\n', ("", 1)),
        ("a.json", b'{"id": 1}\n{"id": "t', ("all rows beyond row 2", 1)),
        ("a.json", b'{"id": 1}\n{"id": "t"wo"}\n', ("", 1)),
        ("a.json", b"", ("the whole file", 0)),
        ("a.tsv", b"id\ttext\n1\tone\n2", ("all rows beyond row 2", 1)),
        ("a.tsv", b"id\ttext\n1\tone\n2\n", ("", 1)),
        ("a.tsv", b"", ("the whole file", 0)),
        ("a.parquet", b"no parquet", ("the whole file", 0)),
    ],
)
def test_a_file_that_was_cut_is_told_from_a_broken_row(tmp_path, name, data, expected):
    assert lost(read(write(tmp_path / name, data))) == expected


def test_json_holds_rows_or_faults(tmp_path):
    rows = read(write(tmp_path / "a.json", b'[{"id": 1}, 5, {"id": 2}]'))
    assert "a row must be a JSON object, found int" in reason_of(rows)
    assert [number for number, _ in rows] == [1, 2, 3]


def table(rows: list[list], delimiter: str = "\t") -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue().encode()


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_tables_may_hold_line_breaks_quotes_and_long_cells(tmp_path, name, delimiter):
    texts = ['one "two"\tthree, four\nfive', "x" * 3_000_000, "caf\u00e9"]
    data = b"\xef\xbb\xbf" + table([["id", "text"], *([n, text] for n, text in enumerate(texts))], delimiter)
    rows = read(write(tmp_path / name, data))
    assert rows == [(n + 1, {"id": str(n), "text": text}) for n, text in enumerate(texts)]


def test_empty_cells_are_missing_values(tmp_path):
    assert read(write(tmp_path / "a.tsv", b"id\ttext\n1\t\n\n\tx\n")) == [
        (1, {"id": "1", "text": None}), (2, {"id": None, "text": "x"}),
    ]  # fmt: skip


def test_rows_that_do_not_fit_the_header_are_faults(tmp_path):
    rows = read(write(tmp_path / "a.tsv", b"id\ttext\n1\tx\n2\n3\tx\ty\n4\tx\n"))
    assert [isinstance(entry, UnreadableRow) for _, entry in rows] == [False, True, True, False]
    assert "line 3: 1 cells, the header has 2" in rows[1][1].reason


@pytest.mark.parametrize("line", [b'2\t"x', b'"2\tx', b'2\t"x"\ty', b'2\tx\t"y'])
@pytest.mark.parametrize("closes", [b"", b'"'])
def test_a_quote_that_is_not_closed_costs_its_row(tmp_path, line, closes):
    data = b"id\ttext\n1\tx\n" + line + b"\n3\tx\n4\tx\n5\t" + closes + b"x\n6\tx\n"
    rows = read(write(tmp_path / "a.tsv", data))
    good = {row["id"] for _, row in rows if isinstance(row, dict)}
    assert good >= {"1", "3", "4", "6"}
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6]
    assert "a quote that is not closed" in rows[1][1].reason
    assert rows[1][1].reason.startswith("line 3: ")


def test_quotes_inside_a_cell_need_not_be_doubled(tmp_path):
    rows = read(write(tmp_path / "a.tsv", b'id\ttext\n1\t"Hello" he said\n2\t5" wide\n'))
    assert [row["text"] for _, row in rows] == ["Hello he said", '5" wide']


def test_a_table_without_a_header_is_no_table(tmp_path):
    assert "not even a line with the columns' names" in reason_of(read(write(tmp_path / "a.tsv", b"")))


def test_two_columns_of_a_name_that_is_wanted_are_a_fault(tmp_path):
    table = pa.Table.from_arrays([pa.array([value]) for value in "abc"], names=["text", "text", "other"])
    pq.write_table(table, tmp_path / "a.parquet")
    for file in (tmp_path / "a.parquet", write(tmp_path / "a.csv", b"text,text,other\na,b,c\n")):
        rows = read(file)
        assert (reason_of(rows), lost(rows)) == ("2 columns are called 'text': rename one", ("the whole file", 0))
    assert read(write(tmp_path / "b.csv", b"text,other,other\na,b,c\n"))[0][1]["text"] == "a", "nobody wants the others"


def test_cells_longer_than_allowed_are_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 100)
    limit = csv.field_size_limit()
    rows = read(write(tmp_path / "a.tsv", table([["id", "text"], [1, "x"], [2, "x" * 200], [3, "x"]])))
    assert "line 3: a record of more than 100 characters" in reason_of(rows)
    assert [values for _, values in rows if isinstance(values, dict)] == [
        {"id": "1", "text": "x"},
        {"id": "3", "text": "x"},
    ]
    assert csv.field_size_limit() >= limit, "it is the whole process's"


def parquet(path, rows: list[dict], **settings):
    pq.write_table(pa.Table.from_pylist(rows), path, **settings)
    return path


def test_parquet_is_read_for_the_columns_that_are_wanted(tmp_path):
    rows = [row(n) | {"ocr": "x"} for n in range(70)]
    assert read(parquet(tmp_path / "a.parquet", rows)) == [(n + 1, row(n)) for n in range(70)]
    assert read(parquet(tmp_path / "b.parquet", [{"ocr": "x"}])) == [(1, {"ocr": "x"})]


def test_numbers_stay_what_they_are_beside_missing_ones(tmp_path):
    assert [r["id"] for _, r in read(parquet(tmp_path / "a.parquet", [{"id": 3}, {"id": None}]))] == [3, None]


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1"])
def test_a_file_that_is_no_parquet_is_one_fault(tmp_path, data):
    assert "a.parquet: the file cannot be read at all: " in reason_of(read(write(tmp_path / "a.parquet", data)))


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    path = parquet(tmp_path / "a.parquet", [row(n) for n in range(90)], row_group_size=30, compression="none")
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    rows = read(write(path, bytes(data)))
    assert [number for number, _ in rows] == [*range(1, 32), *range(61, 91)]
    (lost,) = [entry for _, entry in rows if isinstance(entry, UnreadableRow)]
    assert "row group 1 of a.parquet cannot be read" in lost.reason
    assert (lost.lost, lost.rows) == ("rows 31 to 60", 30)


def test_a_cell_that_is_not_utf8_costs_its_row(tmp_path):
    texts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.binary()).cast(pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"id": [1, 2, 3], "text": broken}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [isinstance(entry, UnreadableRow) for _, entry in rows] == [False, True, False]
    assert "a value cannot be read" in reason_of(rows)


def test_a_file_that_went_away_is_a_fault(tmp_path):
    assert "the file cannot be read at all" in reason_of(read(tmp_path / "none.jsonl"))


class Elsewhere(fs.FileSystemHandler):
    """Storage behind a network that is down."""

    def open_input_stream(self, path: str) -> pa.NativeFile:
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    def get_type_name(self) -> str:
        return "s3"

    def _unused(self, *args: object) -> None:
        raise NotImplementedError

    get_file_info = get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _unused
    delete_root_dir_contents = delete_file = move = copy_file = open_input_file = _unused
    open_output_stream = open_append_stream = normalize_path = _unused


def test_a_network_that_fails_is_no_damage():
    """Rows that may be there at the next try are not set aside."""
    with pytest.raises(StreamError, match=r"bucket/a\.jsonl: cannot be read: AWS Error NETWORK_CONNECTION"):
        list(rows_of(fs.PyFileSystem(Elsewhere()), "bucket/a.jsonl", "jsonl", WANTED))
