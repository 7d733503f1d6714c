"""Jobs as a table."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.table import Table

from jobs.terminal import table
from pipeline.config import without_secrets

if TYPE_CHECKING:
    from cluster.client import Job


def jobs_table(jobs: "Sequence[Job]", address: str, progress: Mapping[str, str] | None = None) -> Table:
    """Returns the table of a cluster's jobs, with the command that each was submitted by, or with its `progress`."""
    rows = []
    for job in jobs:
        command = job.metadata.get("command", job.entrypoint)
        last = command if progress is None else progress.get(job.submission_id) or command
        rows.append([job.submission_id, job.status, job.started or "", _duration(job.seconds), last])
    header = ["job", "status", "submitted", "time", "command" if progress is None else "progress, or command"]
    return table(f"Jobs at {without_secrets(address)}", header, rows, text=True)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))
