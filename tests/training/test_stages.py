"""The loop that both stages share, on a stand-in engine: what it does about losses."""

import pytest
import torch

from pipeline.config import ExpertConfig
from pipeline.training import stages
from pipeline.training.stages import Divergence, StageClock, adapted_paths, run_steps, warm_up_cosine


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _losses_are_given(monkeypatch) -> None:
    monkeypatch.setattr(stages, "answer_loss", lambda engine, batch: batch["loss"])


class Engine:
    """Takes no step at all."""

    device = "cpu"

    def __init__(self, accumulated: int = 1) -> None:
        self.gradient_accumulation_steps = lambda: accumulated

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> None: ...


class Losses:
    """A loader of losses, `accumulated` of them a step."""

    wait_seconds = 0.0

    def __init__(self, *losses: float, accumulated: int) -> None:
        self._losses, self._accumulated = iter(losses), accumulated

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        return [{"loss": torch.tensor(next(self._losses))} for _ in range(self._accumulated)]


def run(*losses: float, explosion: float = 3.0, accumulated: int = 1) -> StageClock:
    clock = StageClock()
    steps = range(len(losses) // accumulated)
    run_steps(
        Engine(accumulated),
        Losses(*losses, accumulated=accumulated),
        steps,
        explosion=explosion,
        clock=clock,
        on_step=lambda step, loss: None,
    )
    return clock


def test_losses_are_taken_down() -> None:
    assert run(2.0, 1.5, 1.0).losses == [2.0, 1.5, 1.0]


def test_a_step_is_as_many_batches_as_the_engine_accumulates() -> None:
    assert run(2.0, 1.0, 1.0, 0.5, accumulated=2).losses == [1.5, 0.75]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(bad: float) -> None:
    with pytest.raises(Divergence, match="at step 2; lower the learning rate"):
        run(1.0, bad)


def test_an_explosion_stops() -> None:
    with pytest.raises(Divergence, match=r"rose from 1 to 3\.5 by step 3 \(training\.explosion is 3\)"):
        run(1.0, 2.9, 3.5)


def test_learning_rate_rises_then_falls() -> None:
    factor = warm_up_cosine(ExpertConfig(steps=100, warm_up=0.1))
    values = [factor(step) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1
    assert values[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))


def test_a_regex_that_matches_nothing_is_an_error(tiny_base) -> None:
    with pytest.raises(ValueError, match=r"expert\.target_modules"):
        adapted_paths(tiny_base, "nothing")
