"""Elastic weight consolidation: the penalty and the Fisher information, against what they are by definition."""

from pathlib import Path

import pytest
import torch

from pipeline.config import ExpertConfig
from pipeline.errors import StoredFileError
from pipeline.models.encoding import collate_for
from pipeline.training.elastic_weights import ElasticPenalty, fisher_information, read_fisher, write_fisher
from pipeline.training.lora import with_lora, without_lora
from pipeline.training.loss import answer_loss
from tests.helpers import ask


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def model(tiny_base):
    torch.manual_seed(0)
    peft = with_lora(tiny_base, ExpertConfig(rank=2))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    yield peft
    without_lora(tiny_base, peft)


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def test_fisher_information_is_the_mean_of_squared_gradients(model, tiny_base) -> None:
    rows = [ask(tiny_base.processor, f"repeat : {word}", answer=word) for word in ("dog", "cat sun", "moon")]
    expected = {name: torch.zeros_like(weight) for name, weight in trained(model).items()}
    for row in rows:
        model.zero_grad()
        answer_loss(model, collate_for(tiny_base.processor, [row]), reduction="sum").backward()
        for name, weight in trained(model).items():
            expected[name] += weight.grad.square() / len(rows)
    model.zero_grad()
    batches = [rows[:2], rows[2:], None]  # None: a rank that has no more rows
    found = fisher_information(model, tiny_base, batches, torch.device("cpu"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
    assert all(weight.grad is None for weight in trained(model).values()), "no gradient is left for the next step"


def test_the_penalty_is_half_the_strength_times_squared_moves_weighted(model, tmp_path: Path) -> None:
    information = {name: torch.full_like(weight, 0.5) for name, weight in trained(model).items()}
    write_fisher(tmp_path, information, None)
    penalty = ElasticPenalty(model, tmp_path, 10.0)
    assert penalty().item() == 0.0
    moved = 0.0
    with torch.no_grad():
        for weight in trained(model).values():
            weight += 0.1
            moved += weight.numel() * 0.1**2
    assert penalty().item() == pytest.approx(10.0 / 2 * 0.5 * moved, rel=1e-4)
    penalty().backward()
    some = next(iter(trained(model).values()))
    torch.testing.assert_close(some.grad, torch.full_like(some, 10.0 * 0.5 * 0.1), rtol=1e-3, atol=1e-6)
    model.zero_grad()


def test_fisher_information_of_tasks_adds_up(tmp_path: Path) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    now.mkdir()
    write_fisher(before, {"a": torch.tensor([1.0, 2.0])}, None)
    write_fisher(now, {"a": torch.tensor([0.5, 0.5])}, before)
    assert read_fisher(now)["a"].tolist() == [1.5, 2.5]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoredFileError, match="fisher.safetensors"):
        read_fisher(tmp_path / "adapter")
