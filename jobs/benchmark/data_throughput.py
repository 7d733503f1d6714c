"""Measures how rows become model inputs: speed, memory, and what becomes of bad rows.

    pointsman benchmark data

- Speed: the path of training (Ray Data: read, validate, decode, tile, tokenize) beside `datasets.map` doing the same with
  the same processor, both with as many processes as there are cores, in turns; both are warmed up before.
- Memory: a corpus of several GB streams through; what counts is the peak of all processes above the start.
- Bad rows: the corpus of `malformed_corpus`; every case must be handled, set aside or told as a lost file; none may crash.
- The plan: how far `pointsman plan` is from measured memory, as `benchmark plan` measures it.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
from PIL import Image

from cluster.local import available_cpus, connect
from cluster.usage import PeakMemory, memory_bytes
from jobs.benchmark.memory_estimate import PEAK, measure
from jobs.benchmark.tools.malformed_corpus import Case, build
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import BaseModelConfig, ConfigError, DataConfig, SourceConfig
from pipeline.data.demo.abilities import vocabulary
from pipeline.data.encoded.packing import pack
from pipeline.data.errors import StreamError
from pipeline.data.loading.preprocess import PreparedData, TaskRows, encoded_rows, prepare
from pipeline.data.rows.records import to_record
from pipeline.data.sources.storage import ImageFolder, locate
from pipeline.files import write_json
from pipeline.models.bases import load_processor
from pipeline.models.encoding import Encoded, encode
from pipeline.models.tiny import tiny_config, tiny_processor
from pipeline.provenance import now, provenance

SIDE = 448
"""Side of a tile in pixels, InternVL's."""

CASES_AT_ONCE = 20
"""Malformed cases that are prepared together; each alone where one of them crashes."""

PACKAGES = ("ray", "pyarrow", "transformers", "pillow")


def data(
    rows: Annotated[int, typer.Option(help="Rows of the corpus for speed.")] = 600,
    rounds: Annotated[int, typer.Option(help="Rounds of Ray Data and datasets.map, in turn; medians count.")] = 3,
    gigabytes: Annotated[float, typer.Option(help="Size of the corpus for memory; 0 leaves it out.")] = 5.0,
    tiles: Annotated[int, typer.Option(help="Most tiles an image is cut into.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder for the summary.")] = Path("runs/benchmark-data"),
) -> None:
    """Reading and preprocessing: rows per second beside datasets.map, memory over a large corpus, malformed rows."""
    with user_errors():
        _measure(rows, rounds, gigabytes, tiles, output.resolve())


def _measure(rows: int, rounds: int, gigabytes: float, tiles: int, output: Path) -> None:
    started, terminal = now(), Terminal()
    metrics: dict[str, Any] = {}
    with terminal.working("starting Ray"):
        connect()
    # On disk, not on /tmp, which may be memory.
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        folder = Path(scratch)
        base = processor_folder(folder / "base", tiles)
        with terminal.working("writing a corpus of photographs"):
            write_corpus(folder / "speed", rows=rows, size=(1200, 900), quality=85)
        ours, theirs = _speed(terminal, folder, base, rows, rounds)
        metrics["data"] = {
            "rows": rows,
            "rows_per_second": rows / median(ours),
            "datasets_map_rows_per_second": rows / median(theirs),
            "ratio_to_datasets_map": median(theirs) / median(ours),
        }
        if gigabytes:
            metrics["data"] |= _memory(terminal, folder, base, gigabytes)
        metrics["malformed"] = _malformed(terminal, folder, base)
    with terminal.working("comparing planned with measured memory"):
        metrics["plan"] = {"max_relative_error": max(c.error for c in measure() if c.part == PEAK)}
    summary = {
        **provenance("benchmark-data", started, packages=(*PACKAGES, "datasets")),
        "tiles": tiles,
    }
    write_json(output / "summary.json", summary | metrics)
    _show(terminal, metrics)
    terminal.log(f"summary    {output / 'summary.json'}")


def processor_folder(folder: Path, tiles: int) -> BaseModelConfig:
    """Writes a checkpoint folder with InternVL's image sizes, as far as processors look at one."""
    processor = tiny_processor(vocabulary())
    images = processor.image_processor
    images.size, images.crop_to_patches, images.max_patches = {"height": SIDE, "width": SIDE}, True, tiles
    processor.image_seq_length = 256
    processor.save_pretrained(folder)
    tiny_config(processor).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return BaseModelConfig(path=str(folder), max_tiles=tiles)


def write_corpus(folder: Path, *, rows: int, size: tuple[int, int], quality: int, shards: int = 8) -> int:
    """Writes parquet shards of question rows with JPEG images of `size`; returns their bytes.

    Images are smooth noise with a grain, so that they compress as photographs do.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for shard in range(shards):
        count = len(range(shard, rows, shards))
        table_ = pa.table({
            "id": [f"{shard}-{i}" for i in range(count)],
            "question": [f"what is the number {i} ?" for i in range(count)],
            "answer": ["red"] * count,
            "images": [_photograph(random, size, quality) for _ in range(count)],
        })  # fmt: skip
        pq.write_table(table_, folder / f"part-{shard:03}.parquet", row_group_size=64)
    return sum(file.stat().st_size for file in folder.iterdir())


def _photograph(random: np.random.Generator, size: tuple[int, int], quality: int) -> bytes:
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = random.integers(-12, 13, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(coarse, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _part(folder: Path) -> TaskRows:
    columns = {"question": "question", "answer": "answer"}
    return TaskRows(SourceConfig.model_validate({"path": str(folder), "columns": columns}))


def _consume(part: TaskRows, base: BaseModelConfig, folder: Path) -> int:
    """Streams all encoded rows of a part through, as a training worker would; returns how many there were."""
    settings = DataConfig(num_readers=available_cpus(), max_tokens=1 << 15, cache="none")
    encoded = encoded_rows(part, "speed", settings, base=base, data_folder=folder, answer=True)
    rows = 0
    for batch in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert not any(batch["reason"].to_pylist()), "the corpus is good"
        rows += len(batch)
    return rows


def _speed(
    terminal: Terminal, folder: Path, base: BaseModelConfig, rows: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Returns the seconds that Ray Data and datasets.map took in each round."""
    write_corpus(folder / "warm", rows=2 * available_cpus(), size=(300, 200), quality=85, shards=available_cpus())
    ours, theirs = [], []
    for number in range(rounds + 1):
        corpus = folder / ("speed" if number else "warm")
        with terminal.working(f"round {number}/{rounds}" if number else "warming up"):
            began = perf_counter()
            seen = _consume(_part(corpus), base, folder)
            middle = perf_counter()
            mapped = _datasets_map(corpus, base, folder / "cache")
            ended = perf_counter()
        if number:
            assert seen == mapped == rows, "both have read everything"
            ours.append(middle - began)
            theirs.append(ended - middle)
    return ours, theirs


def _datasets_map(corpus: Path, base: BaseModelConfig, cache: Path) -> int:
    """Encodes a corpus with Hugging Face datasets, nothing cached; returns how many rows there were."""
    try:
        from datasets import disable_caching, disable_progress_bars, load_dataset
    except ImportError:
        raise ConfigError("this comparison needs the package datasets: pip install datasets") from None
    disable_progress_bars()
    disable_caching()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepared = load_dataset("parquet", data_files=str(corpus / "*.parquet"), split="train", cache_dir=str(cache))
    work = MapEncoder(base, _part(corpus))
    done = prepared.map(
        work, batched=True, batch_size=16, num_proc=available_cpus(), remove_columns=prepared.column_names
    )
    count = len(done)
    shutil.rmtree(cache)
    return count


class MapEncoder:
    """The function that `datasets.map` gets: the same encoding, without Ray."""

    def __init__(self, base: BaseModelConfig, part: TaskRows) -> None:
        self._part, self._processor = part, load_processor(base)
        self._folder = ImageFolder(*locate(part.source.path))

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Encodes a batch of rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        packed = [pack(self._encoded(row)) for row in rows]
        return {name: [row[name] for row in packed] for name in packed[0]}

    def _encoded(self, row: dict[str, Any]) -> Encoded:
        columns = self._part.source.columns
        record = to_record(row, columns, name="", prompt=self._part.prompt, folder=self._folder)
        return encode(self._processor, record.messages, record.images)


def _memory(terminal: Terminal, folder: Path, base: BaseModelConfig, gigabytes: float) -> dict[str, Any]:
    """Streams a corpus of `gigabytes` through and returns how far memory rose above the start."""
    with terminal.working(f"writing a corpus of {gigabytes:g} GB"):
        one = write_corpus(folder / "one", rows=8, size=(1600, 1200), quality=98, shards=1) / 8
        rows = int(gigabytes * 1e9 / one)
        size = write_large(folder / "large", folder / "one", copies=rows // 8)
    small = base.model_copy(update={"max_tiles": 1})
    with terminal.working(f"streaming {rows} rows of {size / rows / 1e6:.1f} MB"):
        before, began = memory_bytes(), perf_counter()
        with PeakMemory(every=0.5) as peak:
            seen = _consume(_part(folder / "large"), small, folder)
        seconds = perf_counter() - began
    return {
        "corpus_bytes": size,
        "corpus_rows": seen,
        "corpus_rows_per_second": seen / seconds,
        "peak_growth_bytes": peak.bytes - before,
    }


def write_large(folder: Path, one: Path, *, copies: int, shard: int = 32) -> int:
    """Writes the rows of `one` many times, `shard` times a file; returns their bytes."""
    folder.mkdir()
    rows = pq.read_table(one)
    for number in range(-(-copies // shard)):
        many = min(shard, copies - number * shard)
        pq.write_table(
            pa.concat_tables([rows] * many),
            folder / f"part-{number:05}.parquet",
            row_group_size=64,
            use_dictionary=False,
        )
    return sum(file.stat().st_size for file in folder.iterdir())


def _malformed(terminal: Terminal, folder: Path, base: BaseModelConfig) -> dict[str, Any]:
    """Prepares every case of the malformed corpus; returns what became of them."""
    cases = build(folder / "malformed")
    settings = DataConfig(max_bad_share=1, max_lost_files=1)
    outcomes: dict[str, str] = {}
    for start in range(0, len(cases), CASES_AT_ONCE):
        group = cases[start : start + CASES_AT_ONCE]
        with terminal.working(f"malformed rows: {start + len(group)} of {len(cases)} cases"):
            for case, outcome in zip(group, _outcomes(group, settings, base, folder), strict=True):
                outcomes[case.name] = outcome
    wrong = [case.name for case in cases if outcomes[case.name] != case.expected]
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("handled", "quarantined", "lost")}
    crashed = sum(outcome.startswith("crashed") for outcome in outcomes.values())
    return {"cases": len(cases), **counts, "crashed": crashed, "not_as_expected": {n: outcomes[n] for n in wrong}}


def _outcomes(group: Sequence[Case], settings: DataConfig, base: BaseModelConfig, folder: Path) -> list[str]:
    """Returns for each case whether its rows were handled, or set aside for the right reason, or a file lost, or crashed."""
    parts = {case.name: TaskRows(case.source) for case in group}
    quarantine = folder / "quarantine"
    try:
        prepared = prepare(parts, settings, base=base, data_folder=folder, quarantine=quarantine, answer=True)
    except (StreamError, ray.exceptions.RayError) as error:
        if len(group) == 1:
            return [f"crashed: {error}"[:200]]
        return [outcome for case in group for outcome in _outcomes([case], settings, base, folder)]
    return [_outcome(case, prepared, quarantine / f"{case.name}.jsonl") for case in group]


def _outcome(case: Case, prepared: PreparedData, file: Path) -> str:
    good, bad, lost = prepared.counts[case.name], prepared.aside[case.name].rows, prepared.aside[case.name].files
    if (good, bad, lost) != (case.good, case.bad, case.lost):
        return f"{good} good and {bad} bad rows, {lost} lost files, not {case.good}, {case.bad} and {case.lost}"
    if (bad or lost) and not all(case.reason in json.loads(line)["reason"] for line in file.read_text().splitlines()):
        return "set aside for another reason"
    return case.expected


def _show(terminal: Terminal, metrics: dict[str, Any]) -> None:
    data_ = metrics["data"]
    body = [
        ["Ray Data, as in training", f"{data_['rows_per_second']:.1f}", f"{data_['ratio_to_datasets_map']:.2f}"],
        ["datasets.map", f"{data_['datasets_map_rows_per_second']:.1f}", "1.00"],
    ]
    terminal.console.print(table("Reading and preprocessing", ["path", "rows per second", "ratio"], body))
    malformed = metrics["malformed"]
    terminal.log(
        f"malformed  {malformed['cases']} cases: {malformed['handled']} handled, {malformed['quarantined']} set aside, "
        f"{malformed['lost']} told as lost files, {malformed['crashed']} crashed"
        + "".join(f"; {name}: {what}" for name, what in malformed["not_as_expected"].items())
    )
    terminal.log(f"plan       at most {metrics['plan']['max_relative_error']:.1%} from measured memory")
    if "peak_growth_bytes" in data_:
        terminal.log(
            f"memory     {data_['peak_growth_bytes'] / 1e9:.2f} GB above the start over {data_['corpus_bytes'] / 1e9:.2f} GB "
            f"({data_['corpus_rows_per_second']:.1f} rows per second)"
        )
