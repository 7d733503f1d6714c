"""Validation, quarantine and encoding on a real Ray."""

import json
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local import connect
from pipeline.config import BaseModelConfig, ColumnsConfig, DataConfig, SourceConfig
from pipeline.data.encoded.encoding import TaskRows, check_metric
from pipeline.data.encoded.packing import unpack
from pipeline.data.errors import StreamError
from pipeline.data.loading.preprocess import prepare
from pipeline.data.rows.quarantine import SetAside
from pipeline.data.rows.records import BadRow, Reference
from pipeline.data.sources import reader
from pipeline.models.encoding import IGNORED

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    connect()


def run(source: SourceConfig, tiny_folder: Path, folder: Path, *, answer: bool = True, **data):
    return prepare(
        {"mine": TaskRows(source)},
        DataConfig(**data),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=folder,
        quarantine=folder / "quarantine",
        answer=answer,
    )


def line(number: int, answer: str = "red") -> str:
    messages = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": f"row{number}", "messages": messages})


def test_bad_rows_are_set_aside_with_reason_and_id(tiny_folder, tmp_path):
    lines = [line(n) for n in range(60)]
    lines[7] = '{"id": "broken'
    lines[9] = line(9, answer=" ")
    lines[11] = line(11, answer="very " * 60)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    prepared = run(
        SourceConfig(path=str(tmp_path / "rows.jsonl")), tiny_folder, tmp_path, max_bad_share=0.1, max_tokens=32
    )
    assert (prepared.counts["mine"], prepared.aside["mine"]) == (57, SetAside(3, 0))
    bad = [json.loads(text) for text in (tmp_path / "quarantine" / "mine.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in bad}
    assert "the answer is empty" in reasons["row9"]
    assert "data.max_tokens allows 32" in reasons["row11"]
    assert any("not valid JSON" in reason for reason in reasons.values())
    assert all(row["source"].endswith("rows.jsonl") for row in bad)


def test_too_many_bad_rows_fail_the_task(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join([line(0), "nonsense", "nonsense too"]) + "\n")
    with pytest.raises(StreamError, match=r"2 of 3 rows.*max_bad_share.*mine\.jsonl"):
        run(SourceConfig(path=str(tmp_path / "rows.jsonl")), tiny_folder, tmp_path)


def damaged(folder: Path) -> SourceConfig:
    """Four parquet files of 20 rows, two of them cut, and one with a damaged row group of 5."""
    folder.mkdir()
    for part in range(5):
        rows = [json.loads(line(20 * part + n)) for n in range(20)]
        file = folder / f"part-{part}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=5, compression="none")
        data = bytearray(file.read_bytes())
        if part in (1, 3):
            del data[len(data) // 2 :]
        if part == 4:
            chunk = pq.read_metadata(file).row_group(2).column(0)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        file.write_bytes(bytes(data))
    return SourceConfig(path=str(folder))


def test_a_lost_file_is_no_bad_row(tiny_folder, tmp_path):
    source = damaged(tmp_path / "rows")
    with pytest.raises(StreamError) as caught:
        run(source, tiny_folder, tmp_path, max_bad_share=1)
    message = str(caught.value)
    assert "task 'mine': 3 files of" in message
    assert "part-1.parquet (the whole file): the file cannot be read at all" in message
    assert "part-4.parquet (rows 11 to 15): row group 2" in message
    assert "again, or set data.max_lost_files=3 to go on without it (now 0)" in message
    with pytest.raises(StreamError, match=r"3 files .* set data\.max_lost_files=3 .* \(now 2\)"):
        run(source, tiny_folder, tmp_path, max_lost_files=2)
    with pytest.raises(StreamError, match=r"5 of 60 rows .*data\.max_bad_share allows 5%\)\. First: part-4"):
        run(source, tiny_folder, tmp_path, max_lost_files=3)
    prepared = run(source, tiny_folder, tmp_path, max_lost_files=3, max_bad_share=0.1)
    assert (prepared.counts["mine"], prepared.aside["mine"]) == (55, SetAside(5, 3))
    written = [json.loads(text) for text in (tmp_path / "quarantine" / "mine.jsonl").read_text().splitlines()]
    assert sorted((Path(entry["source"]).name, entry["rows"], entry["lost"]) for entry in written) == [
        ("part-1.parquet", 0, "the whole file"),
        ("part-3.parquet", 0, "the whole file"),
        ("part-4.parquet", 5, "rows 11 to 15"),
    ]


@pytest.mark.parametrize(
    ("aside", "text"),
    [
        (SetAside(3, 0), "3 bad rows set aside"),
        (SetAside(0, 1), "1 file lost, in part or whole"),
        (SetAside(5, 2), "5 bad rows set aside and 2 files lost, in part or whole"),
    ],
)
def test_what_is_set_aside_is_said(aside, text):
    assert str(aside) == text


def test_question_and_answers_columns(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "what ?", "label": ["a", "b"]}) + "\n")
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), columns=ColumnsConfig(question="query", answer="label"))
    (row,) = run(source, tiny_folder, tmp_path, answer=False).rows(["mine"]).take_all()
    assert json.loads(row["reference"])["answers"] == ["a", "b"]
    assert row["question"] == "what ?"


def test_streaming_gives_the_same_rows_as_the_cache(tiny_folder, tmp_path):
    source = SourceConfig(path="demo://digits/train", limit=40)
    cached = run(source, tiny_folder, tmp_path, cache="memory")
    streamed = run(source, tiny_folder, tmp_path, cache="none")
    assert cached.cache is not None
    assert streamed.cache is None
    one, other = ([row["input_ids"] for row in p.rows(["mine"]).take_all()] for p in (cached, streamed))
    assert one == other


def test_encoded_rows_learn_the_answer_only(tiny_folder, tmp_path):
    prepared = run(SourceConfig(path="demo://successor/train", limit=4), tiny_folder, tmp_path)
    for batch in prepared.rows(["mine"]).iter_batches(batch_format="numpy"):
        for row in unpack(batch):
            assert (row.labels != IGNORED).sum() in (2, 3, 4)  # one to three digits and the end token
            assert not row.images


def test_several_tasks_in_one_pass(tiny_folder, tmp_path):
    parts = {name: TaskRows(SourceConfig(path=f"demo://{name}/eval", limit=10)) for name in ("shape", "repeat")}
    prepared = prepare(
        parts,
        DataConfig(),
        base=BaseModelConfig(path=str(tiny_folder)),
        data_folder=tmp_path,
        quarantine=tmp_path,
        answer=False,
    )
    assert prepared.counts == {"shape": 10, "repeat": 10}
    assert {row["column"] for row in prepared.rows(["repeat"]).take_all()} == {"repeat"}
    assert prepared.rows(["shape", "repeat"]).count() == 20


@pytest.mark.parametrize(
    ("metric", "reference", "message"),
    [
        ("mmbench", Reference(answers=("A",), choices={"A": "red", "B": "blue"}), None),
        ("mmbench", Reference(answers=("C",), choices={"A": "red"}), "the answer 'C' is not an option's letter"),
        ("mmbench", Reference(answers=("A",)), r"\(options: none\)"),
        ("vqa_accuracy", Reference(answers=("red",) * 10), None),
        ("vqa_accuracy", Reference(answers=("red",)), "needs at least 4 answers of people, found 1"),
        ("exact_match", Reference(answers=("red",)), None),
        (None, Reference(answers=("red",)), None),
    ],
)
def test_rows_that_a_metric_cannot_score_are_bad(metric, reference, message):
    with pytest.raises(BadRow, match=message) if message else nullcontext():
        check_metric(reference, metric)


def test_a_source_may_stream_where_others_are_cached(tmp_path):
    """One source says so for its training rows; what it is does not change by it."""
    cached = SourceConfig(path="demo://successor/train", limit=20)
    streamed = cached.model_copy(update={"cache": "none"})
    assert reader.fingerprint(cached, tmp_path) == reader.fingerprint(streamed, tmp_path)
    prepared = prepare(
        {"successor": TaskRows(streamed)},
        DataConfig(),
        base=BaseModelConfig(),
        data_folder=tmp_path,
        quarantine=tmp_path,
        answer=True,
    )
    assert not prepared.training_rows(["successor"]).cached
    assert prepared.counts == {"successor": 20}
