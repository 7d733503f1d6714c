"""Data on S3, by way of a small server that speaks as much of its protocol as reading needs."""

import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.local import connect
from pipeline.config import SourceConfig
from pipeline.data.errors import BadRow, StreamError
from pipeline.data.sources.raw_row import RawRow
from pipeline.data.sources.reader import count_rows, fingerprint, first_records, read

pytestmark = pytest.mark.ray


class Bucket(BaseHTTPRequestHandler):
    """Answers for the objects in `server.objects`, by key; all other buckets are forbidden."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def _answer(self, *, body: bool) -> None:
        objects: dict[str, bytes] = self.server.objects
        parts = urlsplit(self.path)
        bucket, _, key = parts.path.lstrip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        status, data, headers = 404, b"", {}
        if bucket != "data":
            status = 403
        elif "list-type" in query:
            status, data = 200, self._listing(query.get("prefix", [""])[0], query.get("delimiter", [""])[0])
        elif key in objects:
            status, data = 200, objects[key]
            if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                status, data = 206, data[start : end + 1]
        self.send_response(status)
        for name, value in (
            headers | {"Content-Length": len(data), "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _listing(self, prefix: str, delimiter: str) -> bytes:
        keys = sorted(key for key in self.server.objects if key.startswith(prefix))
        inner = {
            key[len(prefix) :].split(delimiter)[0] for key in keys if delimiter and delimiter in key[len(prefix) :]
        }
        shown = [key for key in keys if not (delimiter and delimiter in key[len(prefix) :])]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.server.objects[key])}</Size>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in shown
        )
        prefixes = "".join(
            f"<CommonPrefixes><Prefix>{prefix}{name}/</Prefix></CommonPrefixes>" for name in sorted(inner)
        )
        count = len(shown) + len(inner)
        return (
            f"<ListBucketResult><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>{contents}{prefixes}"
            "</ListBucketResult>"
        ).encode()


def png(size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


def row(number: int, image: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\nsay {number}"}, {"from": "gpt", "value": str(number)}]
    return {"id": f"row{number}", "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def objects():
    """Rows with relative, absolute and forbidden image paths."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row(n, "images/a.png") for n in range(3)]), stream)
    return {
        "llava/train.json": json.dumps([row(0, "images/a.png"), row(1, "s3://data/llava/images/a.png")]).encode(),
        "llava/images/a.png": png((5, 4)),
        "shards/train-00000-of-00001-49492f364babfa44.parquet": stream.getvalue(),
        "shards/images/a.png": png((3, 2)),
        "bad/rows.jsonl": "\n".join(
            json.dumps(row(0, image)) for image in ("../llava/images/a.png", "none.png", "s3://private/a.png", "images")
        ).encode(),
        "bad/images/a.png": b"",
        "damaged/a.parquet": stream.getvalue()[:-100],
    }


@pytest.fixture(scope="module")
def options(objects):
    """What turns a path into one on this server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.objects = objects
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=x"
    server.shutdown()


def source(path: str, options: str, **settings) -> SourceConfig:
    return SourceConfig(path=f"s3://key:secret@{path}{options}", **settings)


def records(config: SourceConfig) -> list:
    return list(first_records(config, Path("/nowhere"), "{question}", 9))


def test_images_are_read_from_where_their_rows_are(options):
    assert [r.images[0].size for r in records(source("data/llava/train.json", options))] == [(5, 4), (5, 4)]
    assert [r.images[0].size for r in records(source("data/shards/train-*", options))] == [(3, 2)] * 3


def test_images_may_lie_elsewhere(options, tmp_path):
    root = f"s3://key:secret@data/shards{options}"
    assert [r.images[0].size for r in records(source("data/llava", options, image_root=root))] == [(3, 2)]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(0, "images/a.png")))
    assert [r.images[0].size for r in records(SourceConfig(path=str(tmp_path), image_root=root))] == [(3, 2)]


def test_folders_are_counted_and_fingerprinted(options):
    config = source("data/shards", options)
    assert count_rows(config, Path("/nowhere")) == 3
    assert len(fingerprint(config, Path("/nowhere"))) == 16


def test_rays_workers_read_it_too(options):
    connect()
    config = source("data/llava", options)
    rows = read(config, Path("/nowhere")).take_all()
    assert [RawRow.of(entry).record(config, "{question}").id for entry in rows] == ["row0", "row1"]
    (entry,) = read(source("data/damaged", options), Path("/nowhere")).take_all()
    with pytest.raises(BadRow, match=r"a\.parquet: the file cannot be read at all"):
        RawRow.of(entry).record(config, "{question}")


def test_what_rows_may_not_name_is_refused(options):
    config = source("data/bad", options)
    reasons = []
    for entry in read(config, Path("/nowhere")).take_all():
        with pytest.raises(BadRow) as error:
            RawRow.of(entry).record(config, "{question}")
        reasons.append(str(error.value))
    for reason, message in zip(
        reasons, ("lies outside of data/bad", "does not exist", "lies outside", "is a folder"), strict=True
    ):
        assert message in reason


@pytest.mark.parametrize("path", ["private/rows.jsonl", "data/none/rows.jsonl", "data/none"])
def test_what_is_not_there_is_told_without_the_keys(path, options):
    with pytest.raises(StreamError, match="are name, region and credentials right|is the path right") as error:
        fingerprint(source(path, options), Path("/nowhere"))
    assert f"s3://{path}: " in str(error.value)
    assert "secret" not in str(error.value)
