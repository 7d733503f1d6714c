"""The corpus of malformed data, all of it through preparation on a real Ray."""

import json
from collections.abc import Iterator

import pytest

from cluster.local import connect
from jobs.benchmark.tools.malformed_corpus import Case, build
from pipeline.config import BaseModelConfig, DataConfig
from pipeline.data.loading.preprocess import TaskRows, prepare

pytestmark = pytest.mark.ray

GROUP = 10
"""Cases that are prepared at a time; Ray plans their readings together."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return build(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def outcomes(cases, tiny_folder, tmp_path_factory) -> dict[str, tuple[int, int, list[dict]]]:
    """Good rows, lost files and what is set aside of every case."""
    connect()
    folder = tmp_path_factory.mktemp("prepared")
    by_name = {}
    for start in range(0, len(cases), GROUP):
        group = cases[start : start + GROUP]
        prepared = prepare(
            {case.name: TaskRows(case.source) for case in group},
            DataConfig(max_bad_share=1, max_lost_files=1),
            base=BaseModelConfig(path=str(tiny_folder)),
            data_folder=folder,
            quarantine=folder / "quarantine",
            answer=True,
        )
        for case in group:
            file = folder / "quarantine" / f"{case.name}.jsonl"
            bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            assert sum(row["rows"] for row in bad) == prepared.aside[case.name].rows
            by_name[case.name] = (prepared.counts[case.name], prepared.aside[case.name].files, bad)
    return by_name


def failures(cases: list[Case], outcomes: dict[str, tuple[int, int, list[dict]]]) -> Iterator[str]:
    for case in cases:
        good, lost, bad = outcomes[case.name]
        rows = sum(row["rows"] for row in bad)
        if (good, rows, lost) != (case.good, case.bad, case.lost):
            reasons = [row["reason"] for row in bad]
            expected = f"{case.good}, {case.bad} and {case.lost}"
            yield f"{case.name}: {good} good and {rows} bad rows, {lost} lost files, not {expected}: {reasons}"
        for row in bad:
            if case.reason not in row["reason"]:
                yield f"{case.name}: set aside because {row['reason']!r}, not because {case.reason!r}"


def test_the_corpus_is_large_and_its_cases_differ(cases):
    assert len({case.name for case in cases}) == len(cases) >= 75
    assert {case.expected for case in cases} == {"handled", "quarantined", "lost"}
    assert all(case.good and bool(case.bad or case.lost) == bool(case.reason) for case in cases)


def test_no_case_stops_the_others_or_loses_a_row(cases, outcomes):
    assert list(failures(cases, outcomes)) == []


def test_rows_set_aside_can_be_found_and_shown(outcomes):
    for name, (_, _, bad) in outcomes.items():
        for row in bad:
            assert row["id"], name
            assert "/" in row["source"], name
            assert len(row["reason"]) < 700, name
            assert len(row["excerpt"]) <= 300, name
