"""The images that a local file of rows names by relative paths, so that they can travel with it."""

import re
from collections.abc import Iterator
from pathlib import Path

TEXTS = {".json", ".jsonl", ".tsv", ".csv"}
"""Formats that are text, compressed or not."""

_IMAGE = re.compile(r"[^\s\"',;|]+\.(?:png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)


def images_beside(rows: Path) -> Iterator[Path]:
    """Yields the images that a file of rows names and that lie beside it; what cannot be read names none."""
    names = {name for text in _texts(rows) for name in _IMAGE.findall(text)}
    for name in sorted(names):
        image = rows.parent / name
        if not Path(name).is_absolute() and image.is_file():
            yield image


def _texts(rows: Path) -> Iterator[str]:
    """Yields what a file holds as text: of parquet, its columns of strings alone."""
    if rows.suffix != ".parquet" and TEXTS.isdisjoint(rows.suffixes):
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if rows.suffix != ".parquet":
            with pa.input_stream(str(rows), compression="detect") as file:
                yield file.read().decode(errors="replace")
            return
        with pq.ParquetFile(rows) as parquet:
            leaves = [parquet.schema.column(i) for i in range(len(parquet.schema))]
            strings = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
            for batch in parquet.iter_batches(columns=strings) if strings else ():
                yield str(batch.to_pylist())
    except (OSError, pa.ArrowException):  # the job says so
        return
