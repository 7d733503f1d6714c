"""The corpus of malformed data, all of it through preparation on a real Ray."""

import json
from collections.abc import Iterator

import pytest

from cluster.local import connect
from jobs.benchmark.malformed_corpus import Case, build
from pipeline.config import BaseModelConfig, DataConfig
from pipeline.streams.preprocess import Part, prepare

GROUP = 10
"""Cases that are prepared at a time; Ray plans their readings together."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return build(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(scope="module")
def outcomes(cases, tiny_folder, tmp_path_factory) -> dict[str, tuple[int, list[dict]]]:
    """Good rows and quarantined rows of every case."""
    connect()
    folder = tmp_path_factory.mktemp("prepared")
    found = {}
    for start in range(0, len(cases), GROUP):
        group = cases[start : start + GROUP]
        prepared = prepare(
            {case.name: Part(case.source) for case in group},
            DataConfig(max_bad_share=1),
            base=BaseModelConfig(path=str(tiny_folder)),
            data_folder=folder,
            quarantine=folder / "quarantine",
            answer=True,
        )
        for case in group:
            file = folder / "quarantine" / f"{case.name}.jsonl"
            bad = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            assert len(bad) == prepared.quarantined[case.name]
            found[case.name] = (prepared.counts[case.name], bad)
    return found


def failures(cases: list[Case], outcomes: dict[str, tuple[int, list[dict]]]) -> Iterator[str]:
    for case in cases:
        good, bad = outcomes[case.name]
        if (good, len(bad)) != (case.good, case.bad):
            reasons = [row["reason"] for row in bad]
            yield f"{case.name}: {good} good and {len(bad)} bad rows, not {case.good} and {case.bad}: {reasons}"
        for row in bad:
            if case.reason not in row["reason"]:
                yield f"{case.name}: set aside because {row['reason']!r}, not because {case.reason!r}"


def test_the_corpus_is_large_and_its_cases_differ(cases):
    assert len({case.name for case in cases}) == len(cases) >= 75
    assert {case.expected for case in cases} == {"handled", "quarantined"}
    assert all(case.good and bool(case.bad) == bool(case.reason) for case in cases)


def test_no_case_stops_the_others_or_loses_a_row(cases, outcomes):
    assert list(failures(cases, outcomes)) == []


def test_rows_set_aside_can_be_found_and_shown(outcomes):
    for name, (_, bad) in outcomes.items():
        for row in bad:
            assert row["id"], name
            assert "/" in row["source"], name
            assert len(row["reason"]) < 700, name
            assert len(row["excerpt"]) <= 300, name
