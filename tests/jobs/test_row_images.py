"""Which images travel with a file of rows."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.row_images import images_beside

ROWS = b'{"image": "photos/1.png", "question": "photos/2.png ?"}\n{"image": "photos/missing.png"}\n{"image": "/etc/3.png"}\n'


def jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_bytes(ROWS)
    return folder / "rows.jsonl"


def compressed(folder: Path) -> Path:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(ROWS))
    return folder / "rows.jsonl.gz"


def parquet(folder: Path) -> Path:
    rows = [{"images": ["photos/1.png", "/etc/3.png"]}, {"images": ["photos/missing.png", "photos/2.png"]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def nested(folder: Path) -> Path:
    """As Hugging Face's data sets keep images."""
    rows = [
        {"image": {"bytes": None, "path": "photos/1.png"}},
        {"image": {"bytes": b"photos/x.png", "path": "photos/2.png"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("write", [jsonl, compressed, parquet, nested])
def test_those_that_lie_beside_it_in_every_format(tmp_path: Path, write) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("1.png", "2.png", "x.png"):
        (tmp_path / "photos" / name).write_text("png")
    assert list(images_beside(write(tmp_path))) == [tmp_path / "photos" / "1.png", tmp_path / "photos" / "2.png"]


@pytest.mark.parametrize(
    ("name", "content"), [("rows.parquet", b"PAR1"), ("rows.jsonl.gz", b"no gzip"), ("1.png", b"a.png")]
)
def test_what_cannot_be_read_or_is_no_file_of_rows_names_none(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.png").write_bytes(b"")
    assert list(images_beside(tmp_path / name)) == []
