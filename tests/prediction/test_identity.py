"""Which folders cannot take answers."""

from pathlib import Path

import pytest

from pipeline.config import SourceConfig
from pipeline.prediction.errors import PredictError
from pipeline.prediction.identity import check_apart
from pipeline.prediction.parts import Parts


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "day").mkdir(parents=True)
    (folder / "a.parquet").touch()
    return folder


@pytest.mark.parametrize(
    ("path", "out", "among"),
    [
        ("rows", "rows", True),
        ("rows", "rows/day/answers", True),
        ("rows", "rows/_answers", False),  # hidden from readers
        ("rows", "answers", False),
        ("rows/*.parquet", "rows", True),
        ("rows/*.parquet", "rows/answers", False),
        ("rows/**/*.jsonl", "rows/answers", True),  # as rows that were set aside
        ("rows/**/*.tsv", "rows/answers", False),
        ("rows/a.parquet", "rows", False),
    ],
)
def test_answers_are_not_written_among_the_rows(rows: Path, path: str, out: str, among: bool) -> None:
    source, folder = SourceConfig(path=str(rows.parent / path)), rows.parent / out
    if not among:
        check_apart(source, folder)
        return
    with pytest.raises(PredictError, match=r"lies among the rows .*choose a folder elsewhere"):
        check_apart(source, folder)


def test_rows_at_an_address_are_apart(tmp_path: Path) -> None:
    check_apart(SourceConfig(path="s3://bucket/rows"), tmp_path)


def test_parts_of_others_are_no_answers(tmp_path: Path) -> None:
    """As Spark writes them."""
    (tmp_path / "part-00000-3f2a.snappy.parquet").touch()
    with pytest.raises(PredictError, match=r"part-00000-3f2a\.snappy\.parquet is none of its answers"):
        Parts(tmp_path).done()
