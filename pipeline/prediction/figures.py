"""Figures of a folder of answers, and whether it is complete."""

from pathlib import Path
from typing import Any

from pipeline.config import PredictConfig, ReadingConfig, without_secrets
from pipeline.prediction.errors import PredictError
from pipeline.prediction.parts import Parts
from pipeline.prediction.pool_source import PoolSource

SHOWN = 3
"""Reasons or files that a message names."""


def figures(config: PredictConfig, pool: PoolSource, parts: Parts, rows_in: int) -> dict[str, Any]:
    """Returns what the files of a complete folder hold; raises PredictError where that is not all that came in."""
    totals = parts.totals()
    if rows_in != totals.rows_out + totals.set_aside:
        raise PredictError(
            f"{parts.folder}: {rows_in} rows came in, {totals.rows_out} answers and {totals.set_aside} rows that were set "
            "aside are there; was something deleted, or did the files change meanwhile? Empty the folder and run again"
        )
    return {
        "pool": pool.address,
        "pool_digest": pool.digest,
        "source": without_secrets(config.source.path),
        "told": config.told,
        "rows_in": rows_in,
        "rows_out": totals.rows_out,
        "set_aside": totals.set_aside,
        "lost_files": sorted(totals.lost_files),
        "by_expert": dict(totals.by_expert.most_common()),
    }


def is_complete(parts: Parts, summary: dict[str, Any]) -> bool:
    """Whether all answers are there that a summary counts; raises StoredFileError where a part is damaged."""
    totals = parts.totals()
    return (totals.rows_out, totals.set_aside) == (summary["rows_out"], summary["set_aside"])


def check_bad_share(data: ReadingConfig, summary: dict[str, Any], parts: Parts) -> None:
    """Raises PredictError where more rows were set aside, or more files lost, than the configuration allows."""
    rows, aside, lost = summary["rows_in"], summary["set_aside"], summary["lost_files"]
    quarantine: Path = parts.quarantine(0).parent
    if rows == 0:
        raise PredictError(f"{summary['source']} holds no rows: its files are empty")
    if len(lost) > data.max_lost_files:
        raise PredictError(
            f"{len(lost)} files cannot be read in full, so rows are missing: {', '.join(lost[:SHOWN])}. All others are "
            f"answered in {parts.folder}. Bring them back and choose another folder, or accept it with "
            f"data.max_lost_files={len(lost)}"
        )
    if aside > data.max_bad_share * rows:
        raise PredictError(
            f"{aside} of {rows} rows were set aside (data.max_bad_share allows {data.max_bad_share:.0%}); all others are "
            f"answered in {parts.folder}. First: {'; '.join(parts.reasons(SHOWN))}. All of them with reasons: {quarantine}. "
            "Correct them and choose another folder, or accept it with a larger data.max_bad_share"
        )
