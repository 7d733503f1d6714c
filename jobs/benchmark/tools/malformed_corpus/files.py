"""Files of every format, whole and damaged."""

import base64
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmark.tools.malformed_corpus.corpus import Corpus, Row, as_json, ask, noise, table
from pipeline.config import ColumnsConfig


def lines(corpus: Corpus) -> None:
    """Files of lines."""
    good = as_json(ask())
    for name, data, count in (
        ("byte_order_mark", b"\xef\xbb\xbf" + good, 1),
        ("windows_line_ends", good + b"\r\n" + good + b"\r\n", 2),
        ("blank_lines", b"\n\n" + good + b"\n \t\r\n" + good, 2),
        ("no_last_line_end", good + b"\n" + good, 2),
        ("joined_files", good + b"\n\xef\xbb\xbf" + good + b"\n", 2),
    ):
        corpus.add(name, {"rows.jsonl": data}, count)
    corpus.rows("raw_tab", good.replace(b"what", b"what\t"))
    corpus.add("compressed", {"rows.jsonl.gz": gzip.compress(good + b"\n" + good)}, 2)
    corpus.add("empty_file", {"a.jsonl": b"", "b.jsonl": good}, 1)
    corpus.add("hidden_files", {"a.jsonl": good, "._a.jsonl": b"\x00\x05", ".cache/b.jsonl": b"nonsense"}, 1)
    for name, line, reason in (
        ("broken_line", good[:-9], "not valid JSON"), ("list_as_line", b"[1, 2]", "must be a JSON object, found list"),
        ("number_as_line", b"5", "must be a JSON object, found int"), ("nuls", b"\x00" * 99, "not valid JSON"),
        ("deep", b"[" * 99_999, "nested too deeply"), ("python", b"{'messages': None}", "not valid JSON"),
        ("endless_number", b'{"id": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        ("wide_characters", good.decode().encode("utf-16-le"), "is it UTF-16"),
    ):  # fmt: skip
        corpus.rows(name, line, reason=reason)
    archive = gzip.compress(b"")
    corpus.add("no_archive", {"a.jsonl": good, "b.jsonl.gz": good}, 1, 0, "b.jsonl.gz: the file cannot be read", lost=1)
    cut = {"a.jsonl": good, "b.jsonl.gz": archive[:-4]}
    corpus.add("cut_archive", cut, 1, 0, "b.jsonl.gz: the file cannot be read", lost=1)
    corpus.add("cut_line", {"rows.jsonl": good + b"\n" + good[:-9]}, 1, 1, "not valid JSON", lost=1)


def arrays(corpus: Corpus) -> None:
    """Files of one JSON array."""
    good = json.dumps(ask(id=1))
    quoted = good.replace("what", 'wh"at')
    for name, text, count, bad, reason, lost in (
        ("array", f"[{good}, {good}]", 2, 0, "", 0),
        ("array_of_lines", f"{good}\n{good}\n", 2, 0, "", 0),
        ("trailing_comma", f"\ufeff[{good},\n]", 1, 0, "", 0),
        ("broken_element", f"[{good}, {good[:-1]}, {good}]", 2, 1, "not valid JSON", 0),
        ("broken_last_element", f"[{good}, {quoted}\n]\n", 1, 1, "not valid JSON", 0),
        ("open_quote", f"[{good}, {quoted}, {good}]", 2, 1, "not valid JSON", 0),
        ("cut_element", f"[{good}, {good[:40]}", 1, 1, "no row could be read after it", 1),
        ("cut_array", f"[{good}, {good}", 2, 0, "ends before its array does", 1),
        ("no_objects", f"[{good}, 5, null, [{good}]]", 1, 3, "must be a JSON object", 0),
    ):
        corpus.add(f"json_{name}", {"rows.json": text.encode()}, count, bad, reason, lost=lost)
    corpus.add("json_empty", {"a.json": b"", "b.json": f"[{good}]".encode()}, 1, 0, "the file is empty", lost=1)


def parquet(corpus: Corpus) -> None:
    """Files of columns."""
    good = table([ask(id="a")] * 3)
    image = {"bytes": noise("PNG"), "path": "red.png"}
    corpus.add("hub_shards", {"data/train-00000-of-00001-49492f364babfa44.parquet": table([ask(images=[image])])}, 1)
    for name, data in (("cut", good[:-50]), ("zero", b""), ("no", b"no parquet")):
        reason = "b.parquet: the file cannot be read at all"
        corpus.add(f"{name}_parquet", {"a.parquet": good, "b.parquet": data}, 3, 0, reason, lost=1)
    other = table([{"id": 1, "text": "x"}, {"id": 2, "text": "y"}])
    corpus.add(
        "differing_columns", {"a.parquet": good, "b.parquet": other}, 3, 2, "column 'messages' is missing or null"
    )
    corpus.add(
        "null_cells", {"a.parquet": table([ask(), {"messages": None}])}, 1, 1, "column 'messages' is missing or null"
    )
    groups = table([ask(id=f"{n:09}") for n in range(6)], row_group_size=2, compression="none", use_dictionary=False)
    spot = groups.index(b"000000002") - 12
    damaged = groups[:spot] + b"\xff" * 24 + groups[spot + 24 :]
    corpus.add("damaged_group", {"a.parquet": damaged}, 4, 2, "row group 1 of a", lost=1)
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"what ?", b"what\xe9 ?"], pa.binary()).buffers())
    stream = io.BytesIO()
    pq.write_table(pa.table({"q": texts, "a": ["red", "red"]}), stream)
    columns = ColumnsConfig(question="q", answer="a")
    corpus.add("cells_not_utf8", {"a.parquet": stream.getvalue()}, 1, 1, "a value cannot be read", columns=columns)
    binary = table([{"q": b"what ?", "a": b"red"}, {"q": b"what\xe9 ?", "a": b"red"}])
    corpus.add("binary_cells", {"a.parquet": binary}, 1, 1, "is not valid UTF-8", columns=columns)


def tables(corpus: Corpus) -> None:
    """Files of cells."""
    head, good = b"q\ta\n", b"what ?\tred\n"
    columns = ColumnsConfig(question="q", answer="a")
    corpus.add("table_cut", {"rows.tsv": head + good + good[:5]}, 1, 1, "a cut file?", lost=1, columns=columns)
    for name, data, count, bad, reason in (
        ("cells", b'\xef\xbb\xbfq\ta\r\n"what\n""is""\tit ?"\tred\r\n', 1, 0, ""),
        ("inner_quotes", head + b'"What" is 5" wide ?\tred\n', 1, 0, ""),
        ("empty_cells", head + good + b"\tred\nwhat ?\t\n", 1, 2, "is missing or null"),
        ("ragged", head + good + b"what ?\nwhat ?\tred\tblue\n" + good, 2, 2, "cells, the header has 2"),
        ("open_quote", head + good + b'"what ?\tred\n' + good * 2, 3, 1, "a quote that is not closed"),
        ("not_utf8", head + good + b"what\xe9 ?\tred\n", 1, 1, "is not valid UTF-8"),
        ("nul", head + good + b"what\x00 ?\tred\n", 1, 1, "holds NUL characters"),
    ):
        corpus.add(f"table_{name}", {"rows.tsv": data}, count, bad, reason, columns=columns)
    files = {"metadata.csv": b"file_name,text\nred.png,a box\nnone.png,a box\n", "red.png": noise("PNG")}
    captions = ColumnsConfig(images="file_name", question="text", answer="text")
    corpus.add("image_folder", files, 1, 1, "'none.png' does not exist", columns=captions)


def layouts(corpus: Corpus) -> None:
    """Published files."""
    png = noise("PNG")
    image = {"bytes": png, "path": "a.png"}
    chart: Row = {"image": image, "query": "how many ?", "label": ["14"], "human_or_machine": 0}
    charts = [chart, chart | {"label": []}, chart | {"label": None}]
    corpus.add("chartqa", {"a.parquet": table(charts[:1] * 2)}, 2, preset="chartqa")
    corpus.add("chartqa_without_label", {"a.parquet": table(charts[:2])}, 1, 1, "holds no answer", preset="chartqa")
    corpus.add("chartqa_null_label", {"a.parquet": table(charts[::2])}, 1, 1, "is missing or null", preset="chartqa")
    page: Row = {"questionId": "1", "question": "when ?", "image": image, "docId": 1, "answers": ["1/8/93"]}
    corpus.add("docvqa", {"a.parquet": table([page])}, 1, preset="docvqa")
    corpus.add(
        "docvqa_test", {"a.parquet": table([page, page | {"answers": None}])}, 1, 1, "a test split", preset="docvqa"
    )
    corpus.add(
        "docvqa_no_image", {"a.parquet": table([page, page | {"image": None}])}, 1, 1, "has an image", preset="docvqa"
    )
    picture = base64.b64encode(png).decode()
    head = "index\tquestion\thint\tA\tB\tC\tanswer\timage\n"
    first = f"0\twhich ?\t\tx\ty\t\tA\t{picture}\n"
    for name, line, good, bad, reason in (
        ("", "1\twhich ?\tlook\tx\ty\tz\tB\t0\n", 5, 0, ""),
        ("_without_answer", f"1\twhich ?\t\tx\ty\t\t\t{picture}\n", 2, 1, "has no answer"),
        ("_wrong_letter", f"1\twhich ?\t\tx\ty\t\tC\t{picture}\n", 2, 1, "is not the letter of an option"),
        ("_without_options", f"1\twhich ?\t\t\t\t\tA\t{picture}\n", 2, 1, "has no options"),
        ("_lost_image", "1\twhich ?\t\tx\ty\t\tA\t9\n", 2, 1, "shares the image of row 9, which has none"),
        ("_same_index", f"0\twhich ?\t\tx\ty\t\tA\t{picture}\n", 2, 1, "stands twice"),
        ("_cut", f"1\twhich ?\t\tx\ty\t\tA\t{picture[:100]}", 2, 2, "an image cannot be decoded"),
    ):
        corpus.add(f"mmbench{name}", {"dev.tsv": (head + first + line).encode()}, good, bad, reason, preset="mmbench")
