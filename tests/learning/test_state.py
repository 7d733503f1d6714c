"""What of a run survives restarts."""

from pathlib import Path

from pipeline.learning.state import keep_peak


def test_the_peak_is_that_of_all_restarts(tmp_path: Path) -> None:
    file = tmp_path / "peak.json"
    assert [keep_peak(file, now) for now in (5, 3, 8)] == [5, 5, 8]
