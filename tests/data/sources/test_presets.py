"""Published layouts, as the files' own schemas have them."""

import base64
import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import ColumnsConfig, SourceConfig, TaskConfig
from pipeline.data.sources.reader import count_rows, first_records


def png(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(stream, "PNG")
    return stream.getvalue()


def image(color: str = "red") -> dict:
    return {"bytes": png(color), "path": f"{color}.png"}


def records(folder, preset: str, **settings) -> list:
    source = SourceConfig(path=str(folder), preset=preset, **settings)
    return list(first_records(source, folder, "{question}", 99))


def test_chartqa(tmp_path):
    rows = [
        {"image": image(), "query": "how many bars ?", "label": ["14"], "human_or_machine": 0},
        {"image": image(), "query": "is it red ?", "label": ["Yes"], "human_or_machine": 1},
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "test-00000-of-00001-e2cd0b7a0f9eb20d.parquet")
    parsed = records(tmp_path, "chartqa")
    assert [r.reference.answers for r in parsed] == [("14",), ("Yes",)]
    assert [r.question for r in parsed] == ["how many bars ?", "is it red ?"]
    assert parsed[0].images[0].size == (8, 6)
    assert parsed[1].id == "test-00000-of-00001-e2cd0b7a0f9eb20d.parquet#2"


def test_chartqa_in_its_other_publication(tmp_path):
    rows = [{"type": "human_test", "question": "how many ?", "answer": "14", "image": image()}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    (parsed,) = records(tmp_path, "chartqa")
    assert (parsed.question, parsed.reference.answers, len(parsed.images)) == ("how many ?", ("14",), 1)


def test_docvqa(tmp_path):
    row = {
        "questionId": "49153", "question": "what is the date ?", "question_types": ["handwritten", "form"], "image": image(),
        "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81", "answers": ["1/8/93", "1/8/1993"],
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row, row | {"answers": None}, row | {"image": None}]), tmp_path / "a.parquet")
    (parsed,) = records(tmp_path, "docvqa")
    assert (parsed.id, parsed.reference.answers) == ("49153", ("1/8/93", "1/8/1993"))


NAMES = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "split",
]


def question(index: int, image: str, answer: str = "B") -> list:
    hint = "look" if index else ""
    return [index, "which\none ?", hint, "x", "y", "", "", answer, "ocr", image, "web", "perception", "dev"]


@pytest.mark.parametrize("name", ["dev.tsv", "dev.parquet"])
def test_mmbench(tmp_path, name):
    rows = [question(0, base64.b64encode(png()).decode()), question(1, "0", "A")]
    if name.endswith("tsv"):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([NAMES, *rows])
    else:
        pq.write_table(pa.Table.from_pylist([dict(zip(NAMES, row, strict=True)) for row in rows]), tmp_path / name)
    parsed = records(tmp_path, "mmbench")
    assert [r.id for r in parsed] == ["0", "1000000", "1", "1000001"]
    assert [r.reference.answers for r in parsed] == [("B",), ("A",), ("A",), ("B",)]
    assert [r.reference.group for r in parsed] == ["0", "0", "1", "1"]
    assert parsed[1].reference.choices == {"A": "y", "B": "x"}
    assert parsed[0].messages[0]["content"].startswith("<image>which\none ?\nA. x\nB. y\nAnswer with")
    assert parsed[2].messages[0]["content"].startswith("<image>look\nwhich\none ?\nA. x")
    assert all(r.images[0].getpixel((0, 0)) == (255, 0, 0) for r in parsed)
    assert count_rows(SourceConfig(path=str(tmp_path), preset="mmbench"), tmp_path) >= 4


def test_mmbench_with_images_of_the_hub(tmp_path):
    rows = [dict(zip(NAMES, question(n, ""), strict=True)) | {"image": image()} for n in (3, 1_000_003)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dev-00000-of-00001.parquet")
    parsed = records(tmp_path, "mmbench")
    assert [(r.id, r.reference.group, len(r.images)) for r in parsed] == [("3", "3", 1), ("1000003", "3", 1)]


def test_a_layout_and_columns_exclude_each_other():
    with pytest.raises(ValueError, match="preset 'docvqa' names the columns itself; give either"):
        SourceConfig(path="a", preset="docvqa", columns=ColumnsConfig(id="number"))
    with pytest.raises(ValueError, match="`question` without `answer`"):
        TaskConfig.model_validate({"name": "a", "eval": {"path": "a", "columns": {"question": "q"}}})
