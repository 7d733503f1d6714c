"""Two people register at the same moment, on a registry that locks nothing: what one does between the other's two steps."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion

from pipeline.learning import adding
from pipeline.learning.adding import AddError
from pipeline.learning.registering import RegisteredExpert
from pipeline.registry.contents import places_of
from pipeline.registry.experts import reference_to, register_expert, registered_experts
from pipeline.registry.promotion import promote
from pipeline.registry.successors import retire_expert
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import versions_of
from pipeline.routing.store import StoredExpert
from tests.registry.conftest import MakeExpert, cache, created, experiment, make_expert, make_pool
from tests.registry.test_successors import POOL, start

__all__ = ["cache", "created", "experiment", "make_expert", "make_pool", "start"]

Join = Callable[..., ModelVersion]


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def join(
    start: ModelVersion, make_expert: MakeExpert, experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Join]:
    """Adds an expert to the pool as one person does; `meanwhile` happens when the version before has been read."""
    monkeypatch.setattr(adding, "deciding", lambda name: nullcontext())  # as on a server
    register = adding.register_successor

    def join(task: str, digest: str, meanwhile: Callable[[], object] = lambda: None, **more: Any) -> ModelVersion:
        version = register_expert("untrained", make_expert(task, digest).save(tmp_path / digest))
        expert = StoredExpert(reference_to(task, version), registered_experts())
        config = SimpleNamespace(stream=SimpleNamespace(tasks=(SimpleNamespace(name=task),)))
        identity = SimpleNamespace(expert=lambda task: digest, parts=lambda task: {"seed": 1})
        session: Any = SimpleNamespace(experts=registered_experts(), identity=identity, config=config)

        def seen_late(*arguments: Any, **settings: Any) -> ModelVersion:
            monkeypatch.setattr(adding, "register_successor", register)
            meanwhile()
            return register(*arguments, **settings)

        monkeypatch.setattr(adding, "register_successor", seen_late)
        try:
            settings = {"replaces": False} | more
            made, _ = adding.join_pool(session, start, RegisteredExpert(expert, version, {}), **settings)
        finally:
            monkeypatch.setattr(adding, "register_successor", register)
        return made

    with tracked_run(experiment, "people", "people"):
        yield join


def newest() -> dict[str, str]:
    places = places_of(versions_of(POOL)[0])
    return {name: place.address.rpartition("/")[2] + " retired" * place.retired for name, place in places.items()}


def test_both_tasks_are_in_the_newest_version(join: Join) -> None:
    join("clock", "aa", lambda: join("later", "bb"))
    assert newest() == {"digits": "1", "clock": "1", "later": "1"}


def test_the_same_task_gets_an_answer(join: Join) -> None:
    with pytest.raises(
        AddError, match=r"has an expert of that name already, untrained\.expert\.clock version 2.*--replace"
    ):
        join("clock", "aa", lambda: join("clock", "bb"))
    assert versions_of(POOL)[0].tags["status"] == "refused: clock came from untrained.expert.clock/2 meanwhile"
    join("later", "cc")
    assert newest() == {"digits": "1", "clock": "2", "later": "1"}, "what was refused is not built upon"


def test_the_same_task_may_replace(join: Join) -> None:
    join("clock", "aa", lambda: join("clock", "bb"), replaces=True)
    assert newest() == {"digits": "1", "clock": "1"}


def test_who_is_retired_meanwhile_stays_so(join: Join, start: ModelVersion) -> None:
    promote(POOL, 1)
    join("clock", "aa", lambda: promote(POOL, str(retire_expert(start, "digits").version)))
    assert newest() == {"digits": "1 retired", "clock": "1"}


def test_killed_before_it_looked_the_same_call_finds_what_came_between(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = adding.unseen_changes

    def die(*arguments: Any) -> None:
        raise Killed

    def theirs_then_death() -> None:
        join("later", "bb")
        monkeypatch.setattr(adding, "unseen_changes", die)

    with pytest.raises(Killed):
        join("clock", "aa", theirs_then_death)
    monkeypatch.setattr(adding, "unseen_changes", look)
    assert newest() == {"digits": "1", "clock": "1"}
    join("clock", "aa")
    assert newest() == {"digits": "1", "clock": "1", "later": "1"}
