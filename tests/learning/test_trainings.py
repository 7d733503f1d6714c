"""In which order trainings begin, and what becomes of the others when one fails."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.learning import trainings
from pipeline.learning.trainings import Trainings

NAMES = ["one", "two", "three", "four"]


class Stage:
    """Trainings that end when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at_once: int, ahead: bool) -> None:
        self.tasks = [SimpleNamespace(name=name) for name in NAMES]
        self.begun: list[str] = []
        self.said: list[str] = []
        self._results: dict[str, Any] = {}
        self._told = {name: threading.Event() for name in NAMES}
        monkeypatch.setattr(trainings, "_found_or_trained", self._train)
        run: Any = SimpleNamespace(
            config=SimpleNamespace(stream=SimpleNamespace(tasks=self.tasks)),
            capacity=SimpleNamespace(trainings=at_once, ahead=ahead),
            progress=SimpleNamespace(log=self.said.append),
            closed=False,
        )
        self.trainings = Trainings(run)

    def _train(self, run: Any, task: Any, following: Any) -> Any:
        self.begun.append(task.name)
        assert self._told[task.name].wait(20)
        result = self._results[task.name]
        if isinstance(result, Exception):
            raise result
        return result

    def ends(self, name: str, result: Any) -> None:
        self._results[name] = result
        self._told[name].set()

    def result(self, name: str) -> Any:
        return self.trainings.expert(self.tasks[NAMES.index(name)])

    def has_begun(self, *names: str) -> bool:
        waiting = threading.Event()
        for _ in range(100):
            if set(self.begun) == set(names):
                return True
            waiting.wait(0.02)
        return False


def test_they_go_on_while_those_before_them_are_registered(monkeypatch) -> None:
    stage = Stage(monkeypatch, at_once=2, ahead=True)
    stage.ends("one", 1)
    assert stage.result("one") == 1
    assert stage.has_begun("one", "two", "three"), "two at a time, though nobody has asked for the second"
    stage.ends("three", 3)
    assert stage.has_begun(*NAMES)
    for number, name in enumerate(NAMES[1:], 2):
        stage.ends(name, number)
        assert stage.result(name) == number


def test_where_evaluation_takes_turns_the_next_one_waits_until_it_is_asked_for(monkeypatch) -> None:
    stage = Stage(monkeypatch, at_once=1, ahead=False)
    stage.ends("one", 1)
    assert stage.result("one") == 1
    assert stage.has_begun("one")
    stage.ends("two", 2)
    assert stage.result("two") == 2


def test_after_an_error_none_begins_and_those_before_it_end(monkeypatch) -> None:
    stage = Stage(monkeypatch, at_once=2, ahead=True)
    stage.ends("two", ValueError("the loss is nan"))
    waiting = threading.Thread(target=lambda: stage.result("one"))
    waiting.start()
    for _ in range(100):
        if stage.said:
            break
        threading.Event().wait(0.02)
    assert stage.said == ["  two has failed; the run ends when its turn comes: the loss is nan"]
    stage.ends("one", 1)
    waiting.join(20)
    assert stage.has_begun("one", "two"), "neither three nor four"
    with pytest.raises(ValueError, match="the loss is nan"):
        stage.result("two")
