"""Parquet files that are there whole or not at all, whoever is killed and whoever else writes."""

from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq


def write_table(table: pa.Table, file: Path) -> None:
    """Writes a table beside its place and renames it: of several writers the last one stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{uuid4().hex}")  # hidden: whoever lists the folder does not see it
    try:
        pq.write_table(table, staging)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)
