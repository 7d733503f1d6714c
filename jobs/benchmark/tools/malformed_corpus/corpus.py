"""What a case is, how cases are written down, and the good parts that they are made from."""

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.config import SourceConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One source and what it must come to."""

    name: str
    source: SourceConfig
    good: int
    """Rows that must be usable."""
    bad: int
    """Rows that must be set aside."""
    reason: str = ""
    """What the reason of all that is set aside must contain."""
    lost: int = 0
    """Files that must be reported as lost, in part or whole: an unknown number of their rows is missing."""

    @property
    def expected(self) -> Literal["handled", "quarantined", "lost"]:
        """What the case tests: that odd rows are used, that bad ones are set aside, or that a lost file is no bad row."""
        return "lost" if self.lost else "quarantined" if self.bad else "handled"


@dataclass
class Corpus:
    """The cases that were written so far."""

    folder: Path
    """Holds a folder a case."""
    cases: list[Case] = field(default_factory=list)

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        good: int,
        bad: int = 0,
        reason: str = "",
        *,
        lost: int = 0,
        **source: Any,
    ) -> None:
        """Adds a case whose source is the folder of these files."""
        for path, data in files.items():
            file = self.folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        self.cases.append(Case(name, SourceConfig(path=str(self.folder / name), **source), good, bad, reason, lost))

    def rows(
        self, name: str, *rows: Row | bytes, reason: str = "", files: Mapping[str, bytes] | None = None, **source: Any
    ) -> None:
        """Adds a case of a good row and these (lines as they are, or rows), all handled or, with a reason, all bad."""
        lines = [as_json(ask()), *(row if isinstance(row, bytes) else as_json(row) for row in rows)]
        good, bad = (1, len(rows)) if reason else (1 + len(rows), 0)
        self.add(name, {"rows.jsonl": b"\n".join(lines) + b"\n"} | dict(files or {}), good, bad, reason, **source)

    def image(self, name: str, image: Any, reason: str = "", file: bytes | None = None) -> None:
        """Adds a case of a row with this image: bytes become a file beside the rows."""
        files = {"image.png": image if isinstance(image, bytes) else file or b""}
        path = "image.png" if isinstance(image, bytes) else image
        self.rows(name, ask(images=[path]), reason=reason, files=files)


def ask(question: Any = "what ?", answer: Any = "red", **more: Any) -> Row:
    """Returns a row of two messages."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | more


def as_json(value: Any) -> bytes:
    """Returns a row as a line."""
    return json.dumps(value).encode()


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **settings: Any) -> bytes:
    """Returns an image as a file."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **settings)
    return stream.getvalue()


def noise(format: str) -> bytes:
    """Returns an image that does not compress, so that its file can be cut."""
    return encoded(Image.effect_noise((32, 32), 60), format)


def bomb(width: int, height: int) -> bytes:
    """Returns a PNG that claims a size and holds nothing."""
    chunks = ((b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def table(rows: Sequence[Row], **settings: Any) -> bytes:
    """Returns rows as a parquet file."""
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), stream, **settings)
    return stream.getvalue()
