"""Atomic writes of parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import atomic_file


def write_table(table: pa.Table, file: Path) -> None:
    """Writes a table atomically."""
    with atomic_file(file) as staging:
        pq.write_table(table, staging)
