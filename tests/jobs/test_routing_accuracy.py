"""Synthetic experts in one pool, learned in this process."""

import pytest
import torch

from jobs.benchmark import routing_accuracy
from jobs.benchmark.routing_accuracy import among_many
from pipeline.config import LearnConfig, StreamConfig, TaskConfig
from pipeline.routing import Pool
from tests.helpers import checksum


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> LearnConfig:
    """So few steps that nothing is learned, which routing does not mind."""
    for name, value in {"STEPS": 2, "TRAIN_ROWS": 64, "PROMPTS": 8}.items():
        monkeypatch.setattr(routing_accuracy, name, value)
    task = TaskConfig(name="any", train="demo://clock/train", eval="demo://clock/eval")
    config = LearnConfig(stream=StreamConfig(tasks=(task,)))
    return config.model_copy(update={"training": config.training.model_copy(update={"cpus_per_worker": 1})})


def test_many_experts_are_told_apart_and_the_base_stays_as_it_is(tiny_base, known_pool, quick):
    before = checksum(tiny_base.model)
    empty = Pool("tiny", tiny_base.fingerprint, quick.router, [], known_pool.null, known_pool.null_layer_statistics)
    actual = among_many(tiny_base, empty, quick, 6)
    assert actual["experts"] == 6
    assert actual["routers"].keys() == {"token", "prompt", "two_level"}
    for kind in ("prompt", "two_level"):
        assert actual["routers"][kind]["routing_accuracy"] >= 0.9
        assert actual["routers"][kind]["new"] == pytest.approx(actual["oracle"], abs=0.15)
    assert checksum(tiny_base.model) == before
    assert not any(
        isinstance(module, torch.nn.Linear) and "lora" in name for name, module in tiny_base.model.named_modules()
    )
