"""Which version of a pool is in use: by hand, by the gate, and back."""

from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from pipeline.registry import promotion
from pipeline.registry.promotion import champion, promote, reason_against, rollback
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, log_scores, scores_of
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import get_version

POOL = "tiny.pool.demo"

CHAMPION = [Score("digits", "d", 0.75, 0.28), Score("clock", "c", 0.94, 0.0), Score("shape", "s", 0.98, 0.98, True)]


@pytest.fixture
def versions(experiment: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """Makes versions of a pool that hold nothing; returns the run's id."""

    monkeypatch.setattr(promotion, "check_complete", lambda version: None)  # there is nothing in them

    def make(count: int) -> str:
        client = MlflowClient()
        client.create_registered_model(POOL)
        with tracked_run(experiment, "demo", "run") as run:
            for _ in range(count):
                model = client.create_logged_model(experiment, "pool", run)
                client.create_model_version(POOL, f"models:/{model.model_id}", run, model_id=model.model_id)
        return run

    return make


def changed(**accuracies: float) -> list[Score]:
    """The champion's scores with other accuracies."""
    return [
        Score(s.dataset, s.digest, accuracies.get(s.dataset, s.accuracy), s.base_accuracy, s.ability) for s in CHAMPION
    ]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (changed(), None),
        (changed(digits=0.74), None),
        (changed(digits=0.73), None),
        (changed(digits=0.72), "digits drops from 0.750 to 0.720"),
        (changed(digits=0.6, clock=0.5), "clock drops from 0.940 to 0.500 and 1 more drop"),
        (changed(shape=0.972), None),
        (changed(shape=0.9), "base abilities kept: 91.8%, at least 99% needed"),
        (CHAMPION[1:], "lacks digits of the champion"),
        ([Score("digits", "other", 0.9, 0.3), *CHAMPION[1:]], "other evaluation prompts than the champion's: digits"),
        ([*CHAMPION, Score("later", "l", 0.1, 0.0)], None),
    ],
)
def test_the_gate(candidate: list[Score], reason: str | None) -> None:
    assert reason_against(candidate, CHAMPION, tolerance=0.02) == reason


def test_the_first_champion_needs_to_keep_the_base_only() -> None:
    assert reason_against(changed(digits=0.0), (), tolerance=0.02) is None
    assert reason_against(changed(shape=0.5), (), tolerance=0.02) is not None


def test_rolling_back_and_forth(versions: Callable[[int], str]) -> None:
    versions(3)
    assert champion(POOL) is None
    with pytest.raises(RegistryError, match="had no other champion before; choose a version"):
        rollback(POOL)
    for number in (1, 3):
        assert int(promote(POOL, number).version) == number
    assert int(rollback(POOL).version) == 1
    assert int(rollback(POOL).version) == 3
    promote(POOL, 3)  # again: nothing moves
    model = MlflowClient().get_registered_model(POOL)
    assert int(model.aliases["champion"]) == 3
    assert model.tags["champions"] == "1,3,1,3"
    MlflowClient().set_registered_model_alias(POOL, "champion", "2")  # as MLflow's pages do
    assert int(rollback(POOL).version) == 3
    with pytest.raises(
        RegistryError, match="no '7' in 'tiny.pool.demo'; there are versions 1, 2, 3 and aliases champion = 3"
    ):
        promote(POOL, 7)


def test_a_promotion_that_was_cut_off_is_none(versions: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The champion stays, and so does what it took the place of."""

    def cut_off(*arguments: object) -> None:
        raise KeyboardInterrupt

    versions(3)
    for number in (1, 2):
        promote(POOL, number)
    for change in (lambda: promote(POOL, 3), lambda: rollback(POOL)):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "set_registered_model_alias", cut_off)
            with pytest.raises(KeyboardInterrupt):
                change()
        in_use = champion(POOL)
        assert in_use is not None
        assert int(in_use.version) == 2
    assert int(rollback(POOL).version) == 1
    assert int(rollback(POOL).version) == 2


def test_scores_are_metrics_by_data_set(versions: Callable[[int], str], experiment: str) -> None:
    run = versions(2)
    for number, scores in ((1, CHAMPION), (2, changed(digits=0.9))):
        version = get_version(POOL, number)
        for _ in range(2):  # a command that was killed tells them again
            log_scores(run, version, scores)
        assert scores_of(version) == scores
    order = [{"field_name": "metrics.accuracy", "dataset_name": "digits", "ascending": False}]
    best = MlflowClient().search_logged_models([experiment], order_by=order)[0]
    assert len([m for m in best.metrics if m.dataset_name]) == 6, "two of each of three data sets, once"
    assert {m.key: m.value for m in best.metrics if not m.dataset_name} == {
        "accuracy": pytest.approx((0.9 + 0.94) / 2), "base_ability": 0.98, "base_accuracy": pytest.approx(0.14),
    }  # fmt: skip
    assert MlflowClient().get_run(run).data.metrics["accuracy"] == pytest.approx(0.92), "by which runs are compared"
    assert best.model_id == get_version(POOL, 2).source.removeprefix("models:/")
