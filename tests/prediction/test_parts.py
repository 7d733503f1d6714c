"""Files of answers: what is there is done, and says where it ends."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import StoredFileError
from pipeline.prediction.parts import ANSWERS, ASIDE, End, Parts


def page(rows: list[tuple[str, int, str, str]]) -> pa.Table:
    """Makes an answered page of (file, number, reason, lost)."""
    return pa.table(
        {
            "id": [f"{file}#{number}" for file, number, _, _ in rows],
            "source": [file for file, _, _, _ in rows],
            "number": [number for _, number, _, _ in rows],
            "question": ["?"] * len(rows),
            "answer": [None if reason else "yes" for _, _, reason, _ in rows],
            "expert": [None if reason else "digits" for _, _, reason, _ in rows],
            "posterior": [None if reason else 0.5 for _, _, reason, _ in rows],
            "reason": [reason for _, _, reason, _ in rows],
            "excerpt": [""] * len(rows),
            "rows": [1] * len(rows),
            "lost": [lost for _, _, _, lost in rows],
        },
        schema=pa.schema([*ANSWERS, *ASIDE]),
    )


def test_a_part_says_where_it_ends(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.write(3, page([("a", 1, "", ""), ("a", 2, "broken", ""), ("b", 1, "cut off", "all rows beyond row 1")]))
    assert parts.done() == {3}
    assert parts.end(3) == End(3, "b", 1, 1, ("b",))
    assert pq.read_table(parts.file(3)).to_pylist() == [
        {
            "id": "a#1",
            "source": "a",
            "number": 1,
            "question": "?",
            "answer": "yes",
            "expert": "digits",
            "posterior": 0.5,
        }
    ]
    aside = [json.loads(line) for line in parts.quarantine(3).read_text().splitlines()]
    assert [(entry["source"], entry["number"], entry["reason"]) for entry in aside] == [
        ("a", 2, "broken"),
        ("b", 1, "cut off"),
    ]
    totals = parts.totals()
    assert (totals.rows_out, totals.set_aside, totals.by_expert, totals.lost_files) == (1, 2, {"digits": 1}, {"b"})
    assert parts.reasons(1) == ["a#2: broken"]


def test_rows_that_share_a_number_are_counted(tmp_path: Path) -> None:
    """Rotations of one question: going on must leave out those that are done, and no other."""
    parts = Parts(tmp_path)
    parts.write(0, page([("a", 1, "", ""), ("a", 2, "", ""), ("a", 2, "", "")]))
    assert parts.end(0).same_place == 2
    parts.write(1, page([("a", 2, "", "")]))
    assert parts.end(1).same_place == 1


def test_a_part_of_bad_rows_is_a_part(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.write(0, page([("a", 1, "broken", "")]))
    assert parts.done() == {0}
    parts.write(0, page([("a", 1, "", "")]))
    assert not parts.quarantine(0).exists(), "of an earlier run"


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.file(0).write_bytes(b"PAR1 cut off")
    with pytest.raises(
        StoredFileError, match=r"part-000000\.parquet: damaged.* delete this file, and its rows are answered"
    ):
        parts.end(0)
