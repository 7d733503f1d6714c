"""The report of a made-up sweep: complete, self-contained, escaped, and content with less."""

import base64
import io
import re

from PIL import Image

from tests.tuning.made_up import result, summary
from tuning.plots import PLOTS
from tuning.report import write_report


def test_the_best_comes_first_and_a_failed_trial_is_one_row_among_others():
    found = result()
    assert found.best is not None
    assert found.best.point == {"expert.rank": 16, "router.temperature": 0.2}
    assert [trial.status for trial in found.trials] == ["done"] * 6 + ["stopped", "failed"]
    figures = found.summary()["sweep"]
    assert figures == {
        "seconds_total": 100.0, "seconds_one_training": 30.0, "trainings": 2, "trials": 8, "stopped": 1, "failed": 1,
    }  # fmt: skip
    assert found.pareto == [1, 3, 5]


def test_a_page_has_everything_and_needs_nothing(tmp_path):
    page = write_report(summary(), tmp_path).read_text()
    assert "Best of 8 trials" in page
    assert "the loss is &lt;nan&gt; at step 3" in page
    assert "stopped after step 50" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "<script" not in page
    images = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(images) == len(PLOTS)
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image))).width > 1500


def test_what_a_sweep_has_not_is_left_out(tmp_path):
    less = summary()
    less["trials"] = [trial for trial in less["trials"] if trial["status"] != "done"]
    less["best"], less["pareto"] = None, []
    page = write_report(less, tmp_path).read_text()
    assert "No trial could be evaluated" in page
    assert "data:image" not in page
    one = summary()
    one["trials"] = one["trials"][:1]
    one["trials"][0]["values"] = {"router.kind": "prompt"}
    for name in ("others", "abilities"):
        del one["trials"][0]["metrics"][name]
    assert "data:image" not in write_report(one, tmp_path).read_text()
