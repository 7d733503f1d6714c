"""Quarantine of bad rows and of files that cannot be read in full: written to a file, counted, checked against limits.

Independent of how rows are read or encoded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import ReadingConfig, SourceConfig, without_secrets
from pipeline.data.errors import StreamError

NOTES = ("id", "reason", "excerpt", "source", "rows", "lost")
"""Columns of an entry: `rows` is the number of rows it stands for (a row, the rest of a row group; 0 if unknown), `lost` the
unreadable part of its file; empty for a bad row."""

_NAMED = 3
"""Rows or files that an error lists; the quarantine file lists all."""


@dataclass(frozen=True)
class SetAside:
    """Counts of rows and files of a source that are not used."""

    rows: int
    """Bad rows, and rows in unreadable parts of files if their number is known."""
    files: int
    """Files that cannot be read in full."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.files)

    def __str__(self) -> str:
        rows = f"{self.rows} bad row{'s' * (self.rows != 1)} set aside"
        files = f"{self.files} file{'s' * (self.files > 1)} lost, in part or whole"
        return " and ".join([rows] * bool(self.rows or not self.files) + [files] * bool(self.files))


def set_aside(
    task: str, source: SourceConfig, bad: Sequence[Mapping[str, Any]], good: int, file: Path, data: ReadingConfig
) -> SetAside:
    """Writes the bad rows of a task's source (`NOTES`) to `file`, one JSON object per line; `good` rows are left.

    Raises StreamError where more files are lost than `data.max_lost_files` allows, where the share of bad rows exceeds
    `data.max_bad_share`, or where no row is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if bad:
        file.write_text("".join(json.dumps({name: entry[name] for name in NOTES}) + "\n" for entry in bad))
    path = without_secrets(source.path)
    lost: dict[str, str] = {}
    for entry in bad:
        if entry["lost"] and entry["source"] not in lost:
            name = PurePosixPath(entry["source"]).name
            reason = entry["reason"].removeprefix(f"{name}: ").rstrip(".")
            lost[entry["source"]] = f"{name} ({entry['lost']}): {reason}"
    if len(lost) > data.max_lost_files:
        files = f"{len(lost)} files" if len(lost) > 1 else "a file"
        named = "; ".join([*lost.values()][:_NAMED] + ["..."] * (len(lost) > _NAMED))
        raise StreamError(
            f"task {task!r}: {files} of {path} cannot be read in full, so rows are missing: {named}. Copy or download what is "
            f"damaged again, or set data.max_lost_files={len(lost)} to go on without it (now {data.max_lost_files}). All of "
            f"them with reasons: {file}"
        )
    rows = sum(entry["rows"] for entry in bad)
    total = good + rows
    if total == 0:
        raise StreamError(f"task {task!r}: {path} holds no rows: its files are empty")
    if good == 0 or rows > data.max_bad_share * total:
        shown = [entry for entry in bad if entry["rows"]] or bad
        reasons = "; ".join(f"{entry['id'] or 'a row'}: {entry['reason']}" for entry in shown[:_NAMED])
        raise StreamError(
            f"task {task!r}: {rows} of {total} rows of {path} cannot be used (data.max_bad_share allows "
            f"{data.max_bad_share:.0%}). First: {reasons}. All of them with reasons: {file}. Correct them, or raise "
            "data.max_bad_share, and run the same command again: what is finished is kept"
        )
    return SetAside(rows, len(lost))
