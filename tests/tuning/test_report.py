"""The report of a made-up sweep: complete, self-contained, escaped, and content with less."""

import base64
import io
import re
from dataclasses import replace
from itertools import pairwise

from PIL import Image

from tests.tuning.made_up import result, summary
from tuning.plots import APART, PLOTS, _Scale
from tuning.report import write_report
from tuning.results import LONGEST, shown


def test_the_best_comes_first_and_a_failed_trial_is_one_row_among_others():
    found = result()
    assert found.best is not None
    assert found.best.point == {"expert.rank": 16, "router.temperature": 0.2}
    assert [trial.status for trial in found.trials] == ["done"] * 6 + ["stopped", "failed"]
    figures = found.summary()["sweep"]
    assert figures == {
        "seconds_total": 100.0, "seconds_one_training": 18.0, "trainings": 2, "trials": 8, "stopped": 1, "failed": 1,
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


def test_a_field_that_a_router_does_not_read_is_no_value_of_its_trial(tmp_path):
    other = summary()
    for trial in other["trials"]:
        trial["values"] = trial["values"] | {"router.kind": "two_level"}
        trial["point"] = trial["point"] | {"router.kind": "two_level"}
    first = other["trials"][0]
    first["point"] = {"expert.rank": 16, "router.kind": "prompt"}
    page = write_report(other, tmp_path).read_text()
    row = page[page.index('<tr class="ours">') :].partition("</tr>")[0]
    assert re.findall(r'<td class="n">([^<]*)</td>', row)[:3] == ["16", "—", "prompt"]


def test_labels_of_an_axis_stand_apart_and_long_texts_are_short():
    places = [place for place, _ in _Scale([1 + i / 100 for i in range(60)] + [2.0]).ticks()]
    assert (places[0], places[-1]) == (0.0, 1.0)
    assert all(b - a >= APART for a, b in pairwise(places))
    assert _Scale([8]).ticks() == [(0.5, "8")]
    modules = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
    assert shown(modules) == ".*language…roj|o_proj)"
    assert len(shown("x" * 500)) <= LONGEST


def test_the_start_of_workers_is_no_part_of_a_training():
    found = result()
    assert found.seconds_one_training == (4 * 3.0 + 8 * 3.0) / 2, "of the stages of those that were trained here"
    assert replace(found, training_seconds={}).seconds_one_training is None
