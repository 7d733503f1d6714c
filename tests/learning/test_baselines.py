"""Baselines over several seeds."""

from statistics import fmean, stdev
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.learning import fine_tuning
from pipeline.learning.baselines import over_seeds


def result(new: float, abilities: float | None) -> dict[str, Any]:
    columns = {"digits": new}
    return {"new": new, "base_abilities": abilities, "samples": 64, "seconds": 10 * new, "columns": columns,
            "columns_by_row": columns}  # fmt: skip


def test_one_seed_is_what_it_is() -> None:
    assert over_seeds([result(0.5, 0.25)], 7) == result(0.5, 0.25)


def test_several_seeds_are_mean_and_spread() -> None:
    new, abilities = (0.2, 0.5, 0.9), (0.1, 0.1, 0.4)
    actual = over_seeds([result(*pair) for pair in zip(new, abilities, strict=True)], 7)
    assert actual["new"] == pytest.approx(fmean(new))
    assert actual["columns"] == actual["columns_by_row"] == {"digits": pytest.approx(fmean(new))}
    assert actual["spread"] == {"new": pytest.approx(stdev(new)), "base_abilities": pytest.approx(stdev(abilities))}
    assert actual["by_seed"]["9"] == {"new": 0.9, "base_abilities": 0.4}
    assert (actual["samples"], actual["seconds"]) == (64, pytest.approx(10 * fmean(new)))


def test_a_stream_without_benchmarks_has_no_base_abilities() -> None:
    actual = over_seeds([result(0.2, None), result(0.4, None)], 0)
    assert actual["base_abilities"] is None
    assert actual["spread"].keys() == actual["by_seed"]["1"].keys() == {"new"}


def test_trainings_without_a_pool_go_on_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that wait for each other end only if they are done at the same time; results come as they were asked for."""
    both = Barrier(2, timeout=20)

    def train(name: str) -> fine_tuning.Method:
        def done(session: object, seed: int) -> list[Any]:
            both.wait()
            return [(name, seed)]

        return done

    monkeypatch.setattr(fine_tuning, "METHODS", {name: train(name) for name in ("replay", "ewc")})
    session: Any = SimpleNamespace(capacity=SimpleNamespace(trainings=2))
    wanted = [("replay", 0), ("ewc", 0), ("replay", 1), ("ewc", 1)]
    trained = fine_tuning.fine_tune(session, wanted)
    assert list(trained.items()) == [(of, [of]) for of in wanted]


def test_a_training_beside_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Barrier(2, timeout=20)

    def fine(session: object, seed: int) -> list[Any]:
        both.wait()
        return []

    def failing(session: object, seed: int) -> list[Any]:
        both.wait()
        raise RuntimeError("diverged")

    session: Any = SimpleNamespace(capacity=SimpleNamespace(trainings=2))
    for names in (("ewc", "replay"), ("replay", "ewc")):
        monkeypatch.setattr(fine_tuning, "METHODS", dict(zip(names, (fine, failing), strict=True)))
        with pytest.raises(RuntimeError, match="diverged"):
            fine_tuning.fine_tune(session, [("ewc", 0), ("replay", 0)])


def test_ewc_needs_whole_weights_and_multitask_base_something_to_learn() -> None:
    training, stream = SimpleNamespace(zero_stage=3), SimpleNamespace(base_prompts=None)
    session: Any = SimpleNamespace(config=SimpleNamespace(training=training, stream=stream))
    with pytest.raises(ConfigError, match=r"training\.zero_stage is 3"):
        fine_tuning.ewc(session, 0)
    with pytest.raises(ConfigError, match=r"stream\.base_prompts"):
        fine_tuning.multitask_base(session, 0)
