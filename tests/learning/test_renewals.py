"""Whether an expert of an earlier release was trained as a configuration says, as far as its files tell."""

from pathlib import Path

import pytest

from pipeline.config import LearnConfig, load_config
from pipeline.learning.identity import Identity
from pipeline.learning.renewals import recorded_differences
from pipeline.routing import ExpertCard
from pipeline.routing.trained import TrainedExpert
from tests.learning.test_identity import config as config


def trained(config: Path) -> TrainedExpert:
    """Returns an expert as an earlier release has trained it by the configuration."""
    settings = load_config(config, [], LearnConfig)
    (task,) = settings.stream.tasks
    card = ExpertCard(
        name=task.name,
        task=task.name,
        base_fingerprint="f",
        rank=settings.expert.rank,
        alpha=settings.expert.lora_alpha,
        seed=settings.seed,
        data_fingerprint=Identity(settings, "f", config.parent / "data").training_rows(task),
        config_digest="old",
        samples=settings.expert.steps * settings.expert.batch_size,
        feature_rule=1,
    )
    return TrainedExpert(card, {"lora_dropout": settings.expert.dropout, "target_modules": "all"}, {}, {})


def differences(config: Path, override: str) -> list[str]:
    settings = load_config(config, [override], LearnConfig)
    router = load_config(config, [], LearnConfig).router.model_dump()
    identity = Identity(settings, "f", config.parent / "data")
    return recorded_differences(identity, settings.stream.tasks[0], trained(config), router)


@pytest.mark.parametrize(
    "override", ["router.feature_width=64", "router.quantile=0.9", "router.kind=token", "training.workers=2"]
)
def test_how_statistics_are_taken_is_no_difference(config: Path, override: str) -> None:
    assert differences(config, override) == []


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("expert.rank=4", ["expert.rank 8 -> 4", "expert.alpha 16 -> 8"]),
        ("expert.steps=9", ["expert.steps x expert.batch_size 8000 -> 288"]),
        ("expert.dropout=0.5", ["expert.dropout 0.0 -> 0.5"]),
        ("expert.target_modules=x", ["expert.target_modules all -> x"]),
        ("router.steps=9", ["router.steps 25 -> 9"]),
        ("seed=3", ["seed 0 -> 3"]),
        ("data.max_tokens=64", ["its data have changed"]),
    ],
)
def test_another_training_is_told(config: Path, override: str, output: list[str]) -> None:
    assert differences(config, override) == output
