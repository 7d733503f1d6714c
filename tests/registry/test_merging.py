"""Several people change one pool at the same time, on a registry that locks nothing: what each has seen is an older version."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities.model_registry import ModelVersion

from pipeline.registry.contents import Place, places_of
from pipeline.registry.experts import register_expert, registered_experts
from pipeline.registry.merging import merged, unseen_changes
from pipeline.registry.successors import open_pool, register_successor, replacement, retire_expert
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import describe, number, versions_of
from tests.registry.conftest import MakeExpert
from tests.registry.test_successors import POOL, extend, start

__all__ = ["extend", "start"]

Extend = Callable[..., ModelVersion]


@pytest.fixture
def merge(experiment: str) -> Callable[..., ModelVersion]:
    def merge(version: ModelVersion, start: ModelVersion, own: str) -> ModelVersion:
        with tracked_run(experiment, "merge", "merge"):
            return merged(version, start, registered_experts(), own=own)

    return merge


def experts(version: ModelVersion) -> dict[str, str]:
    return {
        name: f"{place.address.rpartition('/')[2]}{' retired' * place.retired}"
        for name, place in places_of(version).items()
    }


def test_two_who_add_are_both_in_the_newest(
    start: ModelVersion, extend: Extend, merge: Callable[..., ModelVersion]
) -> None:
    theirs, mine = extend(start, "later"), extend(start, "clock")
    assert unseen_changes(theirs, start) == {}, "whoever was first has nothing to see"
    assert set(unseen_changes(mine, start)) == {"later"}
    both = merge(mine, start, "clock")
    assert experts(both) == {"digits": "1", "clock": "1", "later": "1"}
    assert number(merge(mine, start, "clock")) == number(both), "killed and begun again"
    assert merge(both, start, "clock") == both
    assert len(versions_of(POOL)) == 4


def test_three_who_add_and_one_builds_on_what_has_not_seen_all(
    start: ModelVersion, extend: Extend, merge: Callable[..., ModelVersion]
) -> None:
    extend(start, "later")
    mine = extend(start, "clock")  # has not seen `later`, and is killed
    third = extend(mine, "far")
    assert experts(merge(third, start, "far")) == {"digits": "1", "clock": "1", "far": "1", "later": "1"}


def test_what_is_retired_or_replaced_meanwhile_stays_so(
    start: ModelVersion,
    extend: Extend,
    merge: Callable[..., ModelVersion],
    make_expert: MakeExpert,
    experiment: str,
    tmp_path: Path,
) -> None:
    with tracked_run(experiment, "retire", "retire"):
        retire_expert(start, "digits")
    mine = extend(start, "clock")
    assert experts(merge(mine, start, "clock")) == {"digits": "1 retired", "clock": "1"}
    with tracked_run(experiment, "again", "again"):
        again = register_expert("untrained", make_expert("digits", "e2").save(tmp_path / "again"))
        opened = open_pool(mine)
        replaced = register_successor(opened, replacement(opened, again), ["replaced"], experts=[again])
    far = extend(mine, "far")
    newest = merge(far, start, "far")
    assert experts(newest)["digits"] == "2", "the later of the two changes"
    assert {"clock", "far"} < experts(newest).keys()
    assert number(replaced) < number(newest)


def test_the_same_task_twice_is_seen(start: ModelVersion, extend: Extend, merge: Callable[..., ModelVersion]) -> None:
    extend(start, "clock", "theirs")
    mine = extend(start, "clock", "mine")
    assert unseen_changes(mine, start) == {"clock": Place("untrained.expert.clock/1", False)}
    assert experts(merge(mine, start, "clock"))["clock"] == "2", "the caller decides about its own"


def test_what_nobody_wants_is_not_merged(
    start: ModelVersion, extend: Extend, merge: Callable[..., ModelVersion]
) -> None:
    describe(extend(start, "later"), tags={"status": "refused: digits drops"})
    mine = extend(start, "clock")
    assert merge(mine, start, "clock") == mine
