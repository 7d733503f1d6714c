"""Parquet files that are there whole or not at all, whoever is killed and whoever else writes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files import atomic_file


def write_table(table: pa.Table, file: Path) -> None:
    """Writes a table, all of it or nothing."""
    with atomic_file(file) as staging:
        pq.write_table(table, staging)
