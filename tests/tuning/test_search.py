"""Options of a search: what fits together, and what Tune gets of it."""

from importlib.util import find_spec

import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from pipeline.config import ConfigError, LearnConfig
from tests.tuning.test_space import config, space
from tuning.objective import Objective
from tuning.search import Search, score
from tuning.space import Space


def search(
    settings: LearnConfig,
    given: Space,
    *,
    validation: float = 0.0,
    algorithm: str | None = None,
    scheduler: str = "none",
    trials: int | None = None,
    objective: str = "accuracy",
) -> Search:
    task = settings.stream.tasks[-1].model_copy(update={"validation": validation})
    goal = Objective.read(objective)
    return Search.read(given, settings, task, algorithm=algorithm, scheduler=scheduler, trials=trials, objective=goal)


def test_lists_are_a_grid_ranges_are_drawn():
    settings = config()
    lists = space(settings, "expert.rank=4,8")
    found = search(settings, lists)
    assert (found.algorithm, found.trials, found.samples(lists)) == ("grid", 2, 1)
    ranges = space(settings, "expert.learning_rate=loguniform:1e-4:1e-2", "expert.rank=grid:4,8,16")
    found = search(settings, ranges, trials=5)
    assert (found.algorithm, found.trials, found.samples(ranges)) == ("random", 15, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "bayes"}, "there are grid, random, optuna"),
        ({"scheduler": "median"}, "there are none, asha"),
        ({"algorithm": "grid", "trials": 3}, "every combination once"),
        ({"algorithm": "random"}, "say how many with --trials N"),
        ({"algorithm": "random", "trials": 0}, "say how many with --trials N"),
        ({"scheduler": "asha"}, "task 'later' holds none out"),
    ],
)
def test_options_that_do_not_fit_are_said(given, message):
    settings = config()
    with pytest.raises(ConfigError, match=message):
        search(settings, space(settings, "expert.rank=4,8"), **given)


def test_trainings_are_stopped_at_validations():
    settings = config("expert.steps=250", "expert.validate_every=300")
    with pytest.raises(ConfigError, match="lower it, e.g. expert.validate_every=25"):
        search(settings, space(settings, "expert.rank=4,8"), scheduler="asha", validation=0.1)
    with pytest.raises(ConfigError, match="expert.validate_every cannot be swept"):
        search(settings, space(settings, "expert.validate_every=10,20"), scheduler="asha", validation=0.1)


def test_stopping_early_does_not_begin_with_the_poorest_values():
    settings = config("expert.validate_every=25")
    swept = space(settings, "expert.learning_rate=1e-5,1e-4,1e-3,1e-2,1e-1")
    plain = search(settings, swept, validation=0.1).points
    stopping = search(settings, swept, validation=0.1, scheduler="asha").points
    assert plain is not None
    assert stopping is not None
    assert sorted(map(repr, stopping)) == sorted(map(repr, plain))
    assert stopping != plain


def test_a_missing_optuna_is_said(monkeypatch):
    monkeypatch.setattr("tuning.search.find_spec", lambda name: None)
    settings = config()
    with pytest.raises(ConfigError, match=r"pip install 'pointsman\[optuna\]'"):
        search(settings, space(settings, "expert.rank=4,8"), algorithm="optuna", trials=3)


@pytest.mark.skipif(find_spec("optuna") is None, reason="the extra `optuna` is not installed")
def test_optuna_has_no_grids_and_needs_all_metrics_of_a_front():
    settings = config()
    with pytest.raises(ConfigError, match="draws values, it has no grid"):
        search(settings, space(settings, "expert.rank=grid:4,8"), algorithm="optuna", trials=3)
    plain = space(settings, "expert.rank=4,8")
    with pytest.raises(ConfigError, match="needs all metrics of every trial"):
        search(settings, plain, algorithm="optuna", trials=3, scheduler="asha", validation=0.1, objective="pareto")


def test_a_last_validation_is_not_the_end_of_a_trial():
    """Its evaluation comes after it."""
    settings = config("expert.validate_every=20")
    given = space(settings, "expert.steps=100,200")
    stopper = search(settings, given, scheduler="asha", validation=0.1).stopper(given, settings)
    assert isinstance(stopper, ASHAScheduler)
    assert isinstance(search(settings, given).stopper(given, settings), FIFOScheduler)
    assert stopper._max_t == 200
    assert not stopper._stop_last_trials


def test_of_equal_accuracies_the_loss_decides():
    assert score(0.0, 2.0) > score(0.0, 5.0)
    assert score(0.5, 5.0) > score(0.4, 2.0)
