"""Work beside the main thread: its result, its error, and that it holds up nobody's end."""

import subprocess
import sys
import time

import pytest

from pipeline.learning.background import begin


def test_results_and_errors_come_where_they_are_asked_for() -> None:
    assert begin(lambda: 3, name="one").result(5) == 3
    with pytest.raises(ZeroDivisionError):
        begin(lambda: 1 // 0, name="two").result(5)


def test_a_process_ends_though_work_goes_on() -> None:
    started = time.monotonic()
    script = "import time; from pipeline.learning.background import begin; begin(lambda: time.sleep(60), name='long')"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert time.monotonic() - started < 30
