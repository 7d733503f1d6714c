import json
from functools import partial

import pytest
import torch

from jobs import pretrain_tiny
from jobs.pretrain_tiny import Pretraining, learning_rate_factor
from pipeline.config import BaseModelConfig, ConfigError
from pipeline.data.demo.abilities import vocabulary
from pipeline.data.demo.operations import OPERATIONS
from pipeline.models.bases import load_base
from pipeline.models.tiny import build_tiny, tiny_processor

PLAN = {"steps": 4, "batch_size": 12, "seed": 3}


@pytest.fixture
def begin():
    """A pretraining at its first step, the same every time."""

    def begun() -> Pretraining:
        torch.manual_seed(0)
        processor = tiny_processor(vocabulary())
        model = build_tiny(processor, width=32, layers=1, vision_width=32, vision_layers=1)
        return Pretraining(model.train(), processor, learning_rate=1e-3)

    return begun


def test_a_pretraining_that_was_stopped_goes_on_as_if_it_had_not_been(begin, tmp_path):
    whole, first, second = begin(), begin(), begin()
    for _ in range(4):
        expected = whole.advance(**PLAN)
    for _ in range(2):
        first.advance(**PLAN)
    first.save(tmp_path / "unfinished", "command")
    second.resume(tmp_path / "unfinished", "command")
    assert second.step == 2
    second.advance(**PLAN)
    assert second.advance(**PLAN) == expected
    assert second.sampler.losses == whole.sampler.losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(second.parameters[name], parameter), name


def test_another_pretraining_is_not_gone_on_with(begin, tmp_path):
    run = begin()
    run.advance(**PLAN)
    run.save(tmp_path / "unfinished", "one command")
    with pytest.raises(
        ConfigError, match=r"unfinished is of another pretraining, 'one command': choose another --output"
    ):
        begin().resume(tmp_path / "unfinished", "another command")


def test_steps_reduce_the_loss(begin):
    run = begin()
    losses = [run.advance(steps=60, batch_size=12, seed=0) for _ in range(40)]
    for before, after in zip(losses[0], losses[-1], strict=True):
        assert after < 0.8 * before


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert set(factors[100:700]) == {1.0}
    assert factors[850] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(1 / 300)


def test_the_command_writes_a_base_and_another_may_start_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_tiny, "PROMPTS", 2)
    pretrain = partial(pretrain_tiny.main, steps=2, batch_size=12, layers=1, threads=1)
    pretrain(output=tmp_path / "first")
    pretrain(output=tmp_path / "second", start=tmp_path / "first", seed=1)
    assert load_base(BaseModelConfig(path=str(tmp_path / "second"))).width == 128
    record = json.loads((tmp_path / "second" / "pretraining.json").read_text())
    assert [phase["examples"] for phase in record["history"]] == [24, 24]
    assert f"--start {tmp_path / 'first'}" in record["history"][1]["command"]
    assert {f"{name}.{modality}" for name in OPERATIONS for modality in ("text", "picture")} < set(record["scores"])
    assert not (tmp_path / "second" / pretrain_tiny.UNFINISHED).exists()
