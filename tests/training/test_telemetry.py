"""Progress reaches the driver whatever its listener does, and when Ray does not answer for a while."""

import os
import signal
import time

import pytest
import ray

from cluster.local import connect
from pipeline.training.telemetry import Step, Telemetry, receiving_steps

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    connect()


@pytest.fixture
def actor():
    return ray.remote(num_cpus=0)(Telemetry).remote()


def push(actor, *numbers: int) -> None:
    ray.get(actor.push.remote([("digits", "expert", number, 9, 0.5) for number in numbers]))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_exception_of_the_listener_does_not_silence_the_rest(actor, caplog) -> None:
    seen: list[int] = []

    def on_steps(steps: list[Step]) -> None:
        seen.extend(step.step for step in steps)
        if len(seen) < 3:
            raise RuntimeError("the registry is away")

    with receiving_steps(on_steps, actor, every=0.05):
        for number in (1, 2, 3):
            push(actor, number)
            wait_until(lambda number=number: number in seen)
        push(actor, 4)
    assert seen == [1, 2, 3, 4]
    messages = [record.message for record in caplog.records if "could not be shown" in record.message]
    assert messages == [
        "training goes on, but its progress could not be shown: RuntimeError: the registry is away",
        "progress could not be shown 2 times; the training itself is complete",
    ]


def test_steps_are_not_lost_while_ray_does_not_answer(actor) -> None:
    seen: list[int] = []
    with receiving_steps(lambda steps: seen.extend(step.step for step in steps), actor, every=0.05, timeout=0.5):
        pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
        push(actor, 1)
        wait_until(lambda: seen == [1])
        actor.push.remote([("digits", "expert", 2, 9, 0.5)])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)  # requests time out meanwhile; they are answered later, to nobody
        os.kill(pid, signal.SIGCONT)
        push(actor, 3)
        wait_until(lambda: seen == [1, 2, 3])
        push(actor, 4)
    assert seen == [1, 2, 3, 4]


def test_a_later_receiver_gets_only_what_comes_later(actor) -> None:
    first: list[int] = []
    second: list[int] = []
    with receiving_steps(lambda steps: first.extend(step.step for step in steps), actor, every=0.05):
        push(actor, 1, 2)
    with receiving_steps(lambda steps: second.extend(step.step for step in steps), actor, every=0.05):
        push(actor, 3)
    assert (first, second) == ([1, 2], [3])
