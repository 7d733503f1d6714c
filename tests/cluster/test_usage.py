import subprocess
import sys
import time

import pytest

from cluster.usage import PeakMemory, _quick_bytes, memory_bytes

SIZE = 200_000_000
FILLED = f"import time; held = bytearray(b'1' * {SIZE}); print('filled', flush=True); time.sleep(60)"


def test_children_count_and_the_peak_stays() -> None:
    with PeakMemory(every=0.05) as peak:
        before, quick = memory_bytes(), _quick_bytes()
        with subprocess.Popen([sys.executable, "-c", FILLED], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "filled\n"
            assert memory_bytes() - before == pytest.approx(SIZE, rel=0.2)
            assert _quick_bytes() - quick == pytest.approx(SIZE, rel=0.2)
            time.sleep(0.5)
            child.kill()
        time.sleep(0.2)
        assert memory_bytes() < before + SIZE / 2
    assert peak.bytes >= before + 0.8 * SIZE


def test_flat_memory_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("cluster.usage.memory_bytes", lambda: asked.append(0) or 10)
    with PeakMemory(every=0.01) as peak:
        time.sleep(0.5)
    assert peak.bytes == 10
    assert 1 <= len(asked) <= 5
