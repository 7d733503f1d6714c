"""The loop that both stages share, on a stand-in engine: what a step's loss is, and what is done about bad ones."""

import pytest
import torch

from pipeline.models.encoding import IGNORED
from pipeline.training import loop
from pipeline.training.loop import Divergence, StageClock, run_steps


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _losses_are_given(monkeypatch) -> None:
    monkeypatch.setattr(loop, "answer_loss", lambda engine, batch, reduction: batch["losses"].sum())


class Engine:
    """Notes the losses that it gets, and takes no step at all."""

    device = "cpu"

    def __init__(self) -> None:
        self.losses: list[float] = []

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        self.losses.append(loss.item())

    def step(self) -> None: ...


class Losses:
    """A loader of steps, each of which is a list of micro-batches, each of which is a list of the losses of its tokens."""

    wait_seconds = 0.0

    def __init__(self, *steps: list[list[float]]) -> None:
        self._steps = iter(steps)

    def __iter__(self) -> "Losses":
        return self

    def __next__(self) -> list[dict[str, torch.Tensor]]:
        return [
            {"losses": torch.tensor(losses), "labels": torch.tensor([[IGNORED, IGNORED, *range(len(losses))]])}
            for losses in next(self._steps)
        ]


def run(*steps: list[list[float]], divergence_factor: float = 3.0, engine: Engine | None = None) -> StageClock:
    clock = StageClock()
    run_steps(
        engine or Engine(),
        Losses(*steps),
        range(len(steps)),
        divergence_factor=divergence_factor,
        clock=clock,
        on_step=lambda step, loss: None,
    )
    return clock


def test_losses_are_noted() -> None:
    assert run([[2.0]], [[1.5]], [[1.0]]).losses == [2.0, 1.5, 1.0]


def test_the_loss_of_a_step_is_the_mean_over_all_its_answer_tokens() -> None:
    engine = Engine()
    assert run([[6.0], [1.0, 2.0, 3.0]], engine=engine).losses == [3.0]
    assert engine.losses == [6 / 4, 6 / 4], "each micro-batch's share"


def test_a_micro_batch_without_answers_adds_nothing() -> None:
    assert run([[1.0, 2.0], []]).losses == [1.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(bad: float) -> None:
    with pytest.raises(Divergence, match="at step 2; lower the learning rate"):
        run([[1.0]], [[bad]])


def test_an_explosion_stops() -> None:
    with pytest.raises(Divergence, match=r"rose from 1 to 3\.5 by step 3 \(training\.divergence_factor is 3\)"):
        run([[1.0]], [[2.9]], [[3.5]])


def test_a_penalty_is_added_once_a_step_whatever_the_micro_batches() -> None:
    for steps in ([[6.0, 2.0]], [[6.0], [2.0]]):
        engine, clock = Engine(), StageClock()
        run_steps(
            engine,
            Losses(steps),
            range(1),
            divergence_factor=3.0,
            clock=clock,
            on_step=lambda step, loss: None,
            penalty=lambda: torch.tensor(0.5),
        )
        assert clock.losses == [pytest.approx(4.5)]
        assert sum(engine.losses) == pytest.approx(4.5)
