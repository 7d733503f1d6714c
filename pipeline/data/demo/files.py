"""The demo's tasks as parquet files in the canonical format, read like any user's data.

`demo://<task>/<train|eval>` names a new task's part, `demo://<ability>/eval` an ability's held-out set,
`demo://general/train` the base prompts, `demo://synthetic_<number>/<train|eval>` a part of a synthetic task,
`demo://<stream>_<number>/<train|eval>` one of a confusable task, `demo://<task>+<variant>/<train|eval>` one of a variant,
`demo://<operation>_<text|picture>/<train|eval>` one of an operation that the base has not learned, `demo://strangers/eval`
prompts of no task and no ability.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.demo import abilities, confusable, operations, synthetic, tasks, variants
from pipeline.data.demo.abilities import Example
from pipeline.data.demo.variants import Dialogue
from pipeline.data.errors import StreamError
from pipeline.locks import made_once
from pipeline.storage.mirror import Folder, Mirror

SCHEME = "demo://"
BENCHMARK_ROWS = 100
"""Held-out prompts of an ability."""
BASE_PROMPT_ROWS = 200
"""Base prompts per ability; pretraining and evaluation draw from other seeds."""
EVALUATION_SEED, BASE_PROMPT_SEED = 11, 13
SYNTHETIC_ROWS = {"train": 200, "eval": 40}
"""Rows of a synthetic task."""
CONFUSABLE_ROWS = {"train": 400, "eval": 40}
"""Rows of a confusable task."""
OPERATION_ROWS = {"train": 1500, "eval": 100}
"""Rows of an operation in one modality."""
SPREAD_OUT = 0.5
"""Share of its written training sequences that are spread out as print is (`operations.examples`)."""
_SYNTHETIC = re.compile(r"synthetic_(\d{3}|1\d{3})")
_OPERATIONS = {f"{o}_{m}": (o, m) for o in operations.NEW_OPERATIONS for m in operations.MODALITIES}
_CONFUSABLE = re.compile(rf"({'|'.join(confusable.KINDS)})_0(\d{{2}})")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)
"""The canonical format."""


def demo_file(path: str, folder: Path) -> Path:
    """Returns the parquet file behind a `demo://` path; writes it into `folder` on first use. Raises StreamError."""
    task, part = demo_part(path)
    file = folder / task / f"{part}.parquet"

    def write(unfinished: Path) -> None:
        pq.write_table(_table(_examples(task, part), f"{task}-{part}"), unfinished)

    made_once(file, write, why=f"which writes {path}")
    return file


def demo_address(path: str, folder: Folder) -> str:
    """Returns where all nodes find the file behind a `demo://` path, made on first use. Raises StreamError."""
    place = Mirror.of(folder)
    name = demo_file(path, place.local).relative_to(place.local).as_posix()
    if place.remote is not None and not place.exists(name):
        place.share(name)
    return (place / name).uri


def demo_part(path: str) -> tuple[str, str]:
    """Returns task and part that a `demo://` path names; raises StreamError where there is no such data."""
    task, _, part = path.removeprefix(SCHEME).partition("/")
    names = {f"{t}/{p}" for t in tasks.TASKS for p in ("train", "eval")}
    names |= {f"{f}/eval" for f in abilities.BENCHMARKS} | {"general/train"}
    names |= {f"{name}/{p}" for p in ("train", "eval") for name in variants.variants(p)} | {"strangers/eval"}
    names |= {f"{name}/{p}" for name in _OPERATIONS for p in OPERATION_ROWS}
    numbered = _SYNTHETIC.fullmatch(task) or _CONFUSABLE.fullmatch(task)
    if f"{task}/{part}" not in names and not (numbered and part in ("train", "eval")):
        raise StreamError(
            f"{path}: no such demo data; there are: {', '.join(sorted(names))}, synthetic tasks synthetic_000/train, "
            f"synthetic_000/eval to synthetic_1999, and confusable ones {confusable.KINDS[0]}_000/train, "
            f"{confusable.KINDS[0]}_000/eval to {confusable.KINDS[-1]}_099"
        )
    return task, part


def _examples(task: str, part: str) -> Iterator[Example | Dialogue]:
    if task in tasks.TASKS:
        yield from tasks.examples(task, part)
    elif "+" in task:
        yield from variants.examples(task, part)
    elif task == "strangers":
        yield from variants.strangers()
    elif match := _CONFUSABLE.fullmatch(task):
        yield from confusable.examples(match[1], int(match[2]), CONFUSABLE_ROWS[part], held_out=part == "eval")
    elif task in _OPERATIONS:
        evaluation = part == "eval"
        yield from operations.examples(
            *_OPERATIONS[task],
            OPERATION_ROWS[part],
            evaluation=evaluation,
            spread_out=0.0 if evaluation else SPREAD_OUT,
        )
    elif match := _SYNTHETIC.fullmatch(task):
        yield from synthetic.examples(int(match[1]), SYNTHETIC_ROWS[part], held_out=part == "eval")
    elif task == "general":
        yield from base_prompts()
    else:
        yield from held_out(task)


def held_out(ability: str) -> Iterator[Example]:
    """Yields the held-out examples of an ability."""
    yield from _drawn(ability, EVALUATION_SEED, BENCHMARK_ROWS)


def base_prompts() -> Iterator[Example]:
    """Yields the base prompts: examples of every ability."""
    for ability in abilities.BENCHMARKS:
        yield from _drawn(ability, BASE_PROMPT_SEED, BASE_PROMPT_ROWS)


def _drawn(ability: str, seed: int, rows: int) -> Iterator[Example]:
    for number in range(rows):
        # Four words of seed: pretraining draws from two, so no held-out example can be one of its own.
        random = np.random.default_rng([seed, abilities.BENCHMARKS.index(ability), number, 1])
        yield abilities.ABILITIES[ability](random)


def _table(examples: Iterable[Example | Dialogue], name: str) -> pa.Table:
    rows = []
    for number, example in enumerate(examples):
        dialogue = _dialogue(example) if isinstance(example, Example) else example
        images = []
        for image in dialogue.images:
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        messages = [
            {"role": role, "content": content}
            for turn in dialogue.turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"id": f"{name}-{number:05d}", "messages": messages, "images": images})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _dialogue(example: Example) -> Dialogue:
    images = () if example.image is None else (example.image,)
    return Dialogue(images, ((example.prompt, example.answer),))
