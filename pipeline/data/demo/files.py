"""The embedded stream as files: parquet in the canonical format, read like any user's data.

`embedded://<task>/<train|eval>` names a new task's part, `embedded://<family>/eval` a foundation family's held-out set,
`embedded://general/train` the small sample of general prompts, `embedded://synthetic_<number>/<train|eval>` a part of a
cheap task.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.demo import foundation, synthetic, tasks
from pipeline.data.demo.foundation import Example
from pipeline.data.faults import StreamError
from pipeline.locks import made_once

SCHEME = "embedded://"
FOUNDATION_ROWS = 100
"""Held-out prompts of a foundation family."""
GENERAL_ROWS = 200
"""Prompts of each family in the general sample, drawn apart from pretraining and evaluation."""
EVALUATION_SEED, GENERAL_SEED = 11, 13
SYNTHETIC_ROWS = {"train": 200, "eval": 40}
"""Rows of a synthetic task."""
_SYNTHETIC = re.compile(r"synthetic_(\d{3}|1\d{3})")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)
"""The canonical format."""


def embedded_file(path: str, folder: Path) -> Path:
    """Returns the parquet file behind an `embedded://` path; writes it into `folder` on first use."""
    task, _, part = path.removeprefix(SCHEME).partition("/")
    known = {f"{t}/{p}" for t in tasks.TASKS for p in ("train", "eval")}
    known |= {f"{f}/eval" for f in foundation.FOUNDATION} | {"general/train"}
    if f"{task}/{part}" not in known and not (_SYNTHETIC.fullmatch(task) and part in ("train", "eval")):
        raise StreamError(
            f"{path}: no such embedded data; there are: {', '.join(sorted(known))}, and of any number of cheap tasks "
            "synthetic_000/train, synthetic_000/eval to synthetic_1999"
        )
    file = folder / task / f"{part}.parquet"

    def write(unfinished: Path) -> None:
        pq.write_table(_table(_examples(task, part), f"{task}-{part}"), unfinished)

    made_once(file, write, why=f"which writes {path}")
    return file


def _examples(task: str, part: str) -> Iterator[Example]:
    if task in tasks.TASKS:
        yield from tasks.examples(task, part)
    elif found := _SYNTHETIC.fullmatch(task):
        yield from synthetic.examples(int(found[1]), SYNTHETIC_ROWS[part], held_out=part == "eval")
    elif task == "general":
        yield from held_out_general()
    else:
        yield from held_out(task)


def held_out(family: str) -> Iterator[Example]:
    """Yields the held-out examples of a foundation family."""
    yield from _drawn(family, EVALUATION_SEED, FOUNDATION_ROWS)


def held_out_general() -> Iterator[Example]:
    """Yields the general sample: examples of every foundation family."""
    for family in foundation.FOUNDATION:
        yield from _drawn(family, GENERAL_SEED, GENERAL_ROWS)


def _drawn(family: str, seed: int, rows: int) -> Iterator[Example]:
    for number in range(rows):
        # Four words of seed: pretraining draws from two, so no held-out example can be one of its own.
        random = np.random.default_rng([seed, foundation.FOUNDATION.index(family), number, 1])
        yield foundation.FAMILIES[family](random)


def _table(examples: Iterable[Example], name: str) -> pa.Table:
    rows = []
    for number, example in enumerate(examples):
        images = []
        if example.image is not None:
            stream = io.BytesIO()
            example.image.save(stream, format="PNG")
            images.append({"bytes": stream.getvalue(), "path": None})
        rows.append(
            {
                "id": f"{name}-{number:05d}",
                "messages": [
                    {"role": "user", "content": ("<image>" if images else "") + example.question},
                    {"role": "assistant", "content": example.answer},
                ],
                "images": images,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)
