"""What is trained in the two stages."""

import pytest

from pipeline.config import ConfigError, ExpertConfig
from pipeline.models.target_modules import adapted_paths
from pipeline.training.expert_stage import warm_up_cosine


def test_learning_rate_rises_then_falls() -> None:
    factor = warm_up_cosine(ExpertConfig(steps=100, warmup_ratio=0.1))
    values = [factor(step) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1
    assert values[100] == pytest.approx(0)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))


def test_a_regex_that_matches_nothing_is_an_error(tiny_base) -> None:
    with pytest.raises(ConfigError, match=r"expert\.target_modules: .nothing. matches the full path of no Linear"):
        adapted_paths(tiny_base.model, tiny_base.family, "nothing")
