"""Garbage that a registration takes up while `gc` deletes it: one of the two sees the other, so nothing is missing then."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.registry import garbage
from pipeline.registry.claims import DELETING, TAKEN_UP, last_needed, may_delete, take_up
from pipeline.registry.experts import find_expert, register_expert, take_up_expert
from pipeline.registry.garbage import Garbage, find_garbage, remove
from pipeline.registry.loading import fetched_pool
from pipeline.registry.promotion import check_complete
from pipeline.registry.retries import RegistryError
from pipeline.registry.successors import open_pool, register_successor
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import logged_model, number, versions_of
from pipeline.routing.store import CACHE_VARIABLE
from tests.registry.conftest import MakeExpert
from tests.registry.test_base_prompts import FEATURES, POOL, Register, null_of, register, stored
from tests.registry.test_successors import start

__all__ = ["register", "start"]


@pytest.fixture
def unused(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> ModelVersion:
    """An expert that no pool refers to."""
    with tracked_run(experiment, "alone", "alone"):
        return register_expert("untrained", make_expert("digits", "of-digits").save(tmp_path / "alone"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Loads the newest version of the pool as another machine does, whose cache is empty."""

    def load() -> None:
        newest = versions_of(POOL)[0]
        with monkeypatch.context() as patch:
            patch.setenv(CACHE_VARIABLE, str(tmp_path / "elsewhere"))
            check_complete(newest)
            pool = fetched_pool(f"{POOL}/{newest.version}")
            assert [pool.experts[name].card.name for name in pool.names] == ["digits"]
            assert pool.null

    return load


def deletes(listed: list[Garbage], between: Callable[[], object], patch: pytest.MonkeyPatch) -> list[bool]:
    """Deletes what was listed, and has `between` happen when it is marked and looked at, but not deleted yet."""

    def then(model: object) -> bool:
        patch.setattr(garbage, "may_delete", may_delete)
        allowed = may_delete(model)
        between()
        return allowed

    patch.setattr(garbage, "may_delete", then)
    return [remove(each) for each in listed]


def test_what_is_taken_up_after_the_last_look_stays(
    register: Register, unused: ModelVersion, elsewhere: Callable[[], None]
) -> None:
    (listed,) = find_garbage(hours=0)
    register(["digits"], null_of(FEATURES))
    assert not remove(listed)
    assert versions_of("untrained.expert.digits") == [unused]
    assert DELETING not in logged_model(unused).tags, "nothing is left of the attempt"
    elsewhere()


def test_statistics_that_are_taken_up_after_the_last_look_stay(
    register: Register, elsewhere: Callable[[], None]
) -> None:
    register(["digits"], null_of(FEATURES), "killed")
    MlflowClient().delete_model_version(POOL, "1")
    listed = [each for each in find_garbage(hours=0) if "base prompts" in each.why]
    register(["digits"], null_of(FEATURES))
    assert [remove(each) for each in listed] == [False]
    assert len(stored()) == 1
    elsewhere()


def test_what_is_being_deleted_is_registered_anew(
    register: Register,
    unused: ModelVersion,
    elsewhere: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = find_garbage(hours=0)
    assert deletes(listed, lambda: register(["digits"], null_of(FEATURES)), monkeypatch) == [True]
    assert [number(version) for version in versions_of("untrained.expert.digits")] == [2]
    elsewhere()


def test_statistics_that_are_being_deleted_are_stored_anew(
    register: Register, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(["digits"], null_of(FEATURES), "killed")
    MlflowClient().delete_model_version(POOL, "1")
    listed = [each for each in find_garbage(hours=0) if "base prompts" in each.why]
    assert deletes(listed, lambda: register(["digits"], null_of(FEATURES)), monkeypatch) == [True]
    assert len(stored()) == 1
    elsewhere()


def test_a_killed_deletion_is_finished_by_the_next(unused: ModelVersion) -> None:
    assert may_delete(logged_model(unused))
    assert find_expert("untrained", "digits", "of-digits") is None
    (again,) = find_garbage(hours=0)
    assert remove(again)
    assert find_garbage(hours=0) == []
    assert not take_up(again.model.model_id if again.model else ""), "it is gone"


def test_an_expert_that_is_being_deleted_takes_nobodys_place(
    start: ModelVersion, make_expert: MakeExpert, experiment: str, tmp_path: Path
) -> None:
    with tracked_run(experiment, "again", "again"):
        second = register_expert("untrained", make_expert("digits", "e2").save(tmp_path / "again"))
        (listed,) = find_garbage(hours=0)
        opened = open_pool(start)
        assert may_delete(logged_model(second))
        with pytest.raises(
            RegistryError, match=r"digits/2 has just been deleted as what no pool needed .*register it anew"
        ):
            register_successor(opened, opened.pool, ["replaced"], experts=[second])
    assert remove(listed) is False, "spared, since somebody has asked for it"
    assert take_up_expert("untrained", "digits", "e2") is not None


def test_age_counts_from_the_last_use(unused: ModelVersion) -> None:
    model = logged_model(unused)
    assert last_needed(model) == model.creation_timestamp / 1000
    later = model.creation_timestamp + 3_600_000
    model.tags[TAKEN_UP] = str(later)
    assert last_needed(model) == later / 1000
