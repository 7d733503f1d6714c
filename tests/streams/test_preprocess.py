"""Validation, quarantine and encoding on a real Ray."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.local import connect
from pipeline.config import BaseModelConfig, ColumnsConfig, DataConfig, SourceConfig
from pipeline.models.prompts import IGNORED
from pipeline.streams.packing import unpack
from pipeline.streams.preprocess import Part, check_metric, prepare
from pipeline.streams.records import BadRow, Reference
from pipeline.streams.sources import StreamError


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    connect()


def run(source: SourceConfig, tiny_folder: Path, folder: Path, *, answer: bool = True, **data):
    return prepare(
        {"mine": Part(source)},
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
    assert (prepared.counts["mine"], prepared.quarantined["mine"]) == (57, 3)
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


def test_question_and_answers_columns(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "what ?", "label": ["a", "b"]}) + "\n")
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), columns=ColumnsConfig(question="query", answer="label"))
    (row,) = run(source, tiny_folder, tmp_path, answer=False).rows(["mine"]).take_all()
    assert json.loads(row["reference"])["answers"] == ["a", "b"]
    assert row["question"] == "what ?"


def test_streaming_gives_the_same_rows_as_the_cache(tiny_folder, tmp_path):
    source = SourceConfig(path="embedded://digits/train", limit=40)
    cached = run(source, tiny_folder, tmp_path, cache="memory")
    streamed = run(source, tiny_folder, tmp_path, cache="none")
    assert cached.cache is not None
    assert streamed.cache is None
    one, other = ([row["input_ids"] for row in p.rows(["mine"]).take_all()] for p in (cached, streamed))
    assert one == other


def test_encoded_rows_learn_the_answer_only(tiny_folder, tmp_path):
    prepared = run(SourceConfig(path="embedded://successor/train", limit=4), tiny_folder, tmp_path)
    for batch in prepared.rows(["mine"]).iter_batches(batch_format="numpy"):
        for row in unpack(batch):
            assert (row.labels != IGNORED).sum() == 4  # three digits and the end token
            assert not row.images


def test_several_tasks_in_one_pass(tiny_folder, tmp_path):
    parts = {name: Part(SourceConfig(path=f"embedded://{name}/eval", limit=10)) for name in ("shape", "repeat")}
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
    ("metric", "reference", "said"),
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
def test_rows_that_a_metric_cannot_score_are_bad(metric, reference, said):
    with pytest.raises(BadRow, match=said) if said else nullcontext():
        check_metric(reference, metric)
