"""Pools made of registered ones: what they take over, and which ones they are built upon."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline.config import BaseModelConfig
from pipeline.evaluation.recorded import evaluate_recorded
from pipeline.learning.replacing import replace_expert
from pipeline.registry.evaluated_prompts import EvaluatedPrompts, has_prompts, keep_prompts, kept_prompts
from pipeline.registry.experts import card_of, register_expert, registered_experts
from pipeline.registry.pools import register_pool
from pipeline.registry.promotion import decide, promote
from pipeline.registry.retries import RegistryError
from pipeline.registry.scores import Score, log_scores
from pipeline.registry.strays import Moved, RoutedPrompt, Strays, keep_strays, moved_prompts, strays_of
from pipeline.registry.successors import (
    base_of,
    newest_with,
    open_pool,
    refused_between,
    register_successor,
    replacement,
    retire_expert,
)
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import describe, get_version, logged_model, number
from pipeline.routing import Pool
from pipeline.routing.features import source_width
from tests.registry.conftest import WIDTH, MakeExpert

POOL = "untrained.pool.demo"

Start = Callable[[], ModelVersion]


@pytest.fixture
def start(
    experiment: str, make_expert: MakeExpert, make_pool: Callable[..., Pool], tiny_folder: Path, tmp_path: Path
) -> ModelVersion:
    """Version 1 of a pool, which holds `digits`."""
    expert = make_expert("digits", "e1")
    with tracked_run(experiment, "demo", "run"):
        version = register_expert("untrained", expert.save(tmp_path / "digits"), rows=64)
        base = BaseModelConfig(path=str(tiny_folder))
        return register_pool(make_pool(expert), base, name="demo", digest="p1", experts={"digits": version})


@pytest.fixture
def extend(experiment: str, make_expert: MakeExpert, tmp_path: Path) -> Callable[..., ModelVersion]:
    """Makes the successor of a version with one more expert."""

    def extend(before: ModelVersion, name: str, digest: str = "", centre: float = 0.0) -> ModelVersion:
        expert = make_expert(name, digest or f"of {name}".replace(" ", "_"), centre)
        with tracked_run(experiment, name, name):
            version = register_expert("untrained", expert.save(tmp_path / name))
            opened = open_pool(before)
            return register_successor(opened, opened.pool.add(expert), ["added", name, digest], experts=[version])

    return extend


def prompts(own: list[float], base: list[float], features_NF: np.ndarray | None = None) -> EvaluatedPrompts:
    count = len(own)
    features_NF = np.zeros((count, source_width(WIDTH)), np.float32) if features_NF is None else features_NF
    names = [f"row {i}" for i in range(count)]
    return EvaluatedPrompts(names, names, [""] * count, features_NF, np.array(own), np.array(base))


def test_a_successor_takes_over_base_and_experts(start: ModelVersion, extend: Callable[..., ModelVersion]) -> None:
    made = extend(start, "clock")
    before, after = open_pool(start), open_pool(made)
    assert (number(made), after.pool.names) == (2, ["digits", "clock"])
    assert after.served == before.served
    assert base_of(made).name == "untrained.base"
    assert [(r.model, r.version) for r in after.in_use.values()] == [
        ("untrained.expert.digits", 1), ("untrained.expert.clock", 1),
    ]  # fmt: skip
    assert after.references["digits"] == before.references["digits"]
    assert number(extend(start, "clock")) == 2, "of the same version and change there is one"
    assert card_of(get_version("untrained.expert.clock", 1)).task == "clock"


def test_additions_go_on_from_each_other(start: ModelVersion, extend: Callable[..., ModelVersion]) -> None:
    """From the newest that has all tasks; not from what was refused, nor from what was rolled back."""
    assert number(newest_with(start)) == 1
    promote(POOL, 1)
    second = extend(start, "clock")
    assert number(newest_with(start)) == 2
    third = extend(second, "later")
    assert number(newest_with(start)) == 3
    describe(third, tags={"status": "refused: clock drops"})
    assert number(newest_with(start)) == 2
    promote(POOL, 2)
    promote(POOL, 1)
    assert number(newest_with(start)) == 1, "version 2 was rolled back from"


def test_another_version_of_an_expert_takes_its_place(
    start: ModelVersion, extend: Callable[..., ModelVersion], make_expert: MakeExpert, experiment: str, tmp_path: Path
) -> None:
    with tracked_run(experiment, "again", "again"):
        second = register_expert("untrained", make_expert("digits", "e2").save(tmp_path / "again"))
        other = register_expert("untrained", make_expert("far", "e3").save(tmp_path / "far"))
    opened = open_pool(start)
    assert replacement(opened, second).card.experts[0].digest == "e2"
    for version, message in (
        (get_version("untrained.expert.digits", 1), "untrained.pool.demo/1 holds untrained.expert.digits/1 already"),
        (other, "has no expert 'far' whose place"),
        (start, "is no expert over base 'untrained'"),
    ):
        with pytest.raises(RegistryError, match=message):
            replacement(opened, version)


def test_prompts_are_kept_beside_the_expert(start: ModelVersion, tmp_path: Path) -> None:
    """They do not come with the expert when a pool is loaded."""
    expert = get_version("untrained.expert.digits", 1)
    assert not has_prompts(expert, "d")
    assert kept_prompts(expert, "d") is None
    given = prompts([1.0, float("nan")], [0.0, 0.5])
    keep_prompts(expert, "d", given)
    kept = kept_prompts(expert, "d")
    assert kept is not None
    np.testing.assert_array_equal(kept.own_N, given.own_N)
    np.testing.assert_array_equal(kept.features_NF, given.features_NF)
    assert (kept.ids, kept.questions) == (given.ids, given.questions)
    folder = registered_experts().ensure(open_pool(start).references["digits"])
    assert not (folder / "evaluation").exists()


def test_a_pool_is_measured_on_kept_prompts(
    start: ModelVersion, extend: Callable[..., ModelVersion], experiment: str
) -> None:
    """Own and base's scores are known; what goes to another expert counts as wrong, and is said."""
    of_digits, of_clock = (
        np.zeros(source_width(WIDTH)),
        np.full(source_width(WIDTH), 40.0),
    )  # where their prompts have their centres
    features_NF = np.stack([of_digits, of_digits, of_clock]).astype(np.float32)
    expert = get_version("untrained.expert.digits", 1)
    keep_prompts(expert, "d", prompts([1.0, 0.5, 1.0], [0.0, 0.0, 0.25], features_NF))
    with tracked_run(experiment, "demo", "run") as run:
        log_scores(run, start, [Score("digits", "d", 0.8, 0.1)])
    kept = open_pool(start).evaluated_on()
    assert kept["digits"].score.accuracy == 0.8
    alone = evaluate_recorded(open_pool(start).pool, {"digits": kept["digits"].prompts})
    assert alone.evaluation.accuracies()["digits"] == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert (alone.unknown, alone.base["digits"]) == ({}, pytest.approx(0.25 / 3))
    retired = evaluate_recorded(open_pool(start).pool.retire("digits"), {"digits": kept["digits"].prompts})
    assert retired.evaluation.accuracies()["digits"] == pytest.approx(0.25 / 3)
    made = extend(start, "clock", centre=40.0)
    kept = open_pool(made).evaluated_on(start)
    with_clock = evaluate_recorded(open_pool(made).pool, {"digits": kept["digits"].prompts})
    assert with_clock.unknown == {"digits": 1}
    assert with_clock.evaluation.accuracies()["digits"] == pytest.approx((1.0 + 0.5) / 3)
    assert [s.expert for s in with_clock.evaluation.results["digits"].strays] == ["clock"]
    token = evaluate_recorded(open_pool(made).pool.routed_by(kind="token"), {"digits": kept["digits"].prompts})
    assert token.undecided == ["digits"]
    assert token.evaluation.results == {}, "where Linears choose nothing can be said"


def test_what_cannot_be_measured_is_left_to_people(
    start: ModelVersion, extend: Callable[..., ModelVersion], experiment: str
) -> None:
    """As where Linears choose: it is not refused, so the next addition goes on from it."""
    with tracked_run(experiment, "demo", "run") as run:
        log_scores(run, start, [Score("digits", "d", 0.8, 0.1)])
    promote(POOL, 1)
    made, alone = extend(start, "clock"), [Score("clock", "c", 0.9, 0.0)]
    verdict = decide(made, alone, gate=True, tolerance=0.02)
    assert verdict.reason is None
    assert verdict.text == (
        "by hand, since its accuracy on digits is not known: `pointsman registry promote untrained.pool.demo 2`"
    )
    assert number(newest_with(start)) == 2
    with tracked_run(experiment, "retire", "retire"):
        retired = retire_expert(made, "digits")
    assert decide(retired, alone, gate=True, tolerance=0.02).reason == "lacks digits of the champion"
    fourth = extend(made, "later")
    assert refused_between(made, fourth) == {3: "refused: lacks digits of the champion"}
    assert refused_between(start, made) == {}


def test_a_base_ability_that_only_the_champion_was_measured_on_is_left_to_people(
    start: ModelVersion, extend: Callable[..., ModelVersion], experiment: str
) -> None:
    """It might be lost, and nobody would know."""
    digits, shape = Score("digits", "d", 0.8, 0.1), Score("shape", "s", 0.9, 0.9, True)
    with tracked_run(experiment, "demo", "run") as run:
        log_scores(run, start, [digits, shape])
    promote(POOL, 1)
    made = extend(start, "clock")
    verdict = decide(made, [digits], gate=True, tolerance=0.02)
    assert verdict.text.startswith("by hand, since its accuracy on shape is not known")
    assert decide(made, [digits, shape], gate=True, tolerance=0.02).text == "promoted by the gate, after version 1"


def test_a_mistyped_replacement_leaves_no_run(start: ModelVersion, experiment: str) -> None:
    runs = len(MlflowClient().search_runs([experiment]))
    for expert, message in (
        (get_version("untrained.expert.digits", 1), "holds .* already"),
        (start, "is no expert over"),
    ):
        with pytest.raises(RegistryError, match=message):
            replace_expert(start, expert)
    assert len(MlflowClient().search_runs([experiment])) == runs


def test_prompts_change_hands() -> None:
    def strays(digest: str = "d", own: str = "digits", **experts: str) -> Strays:
        return Strays(digest, own, [RoutedPrompt(id, f"what is {id}", expert) for id, expert in experts.items()])

    before = {"digits": strays(a="base", b="clock"), "shape": strays(own="base"), "gone": strays()}
    after = {"digits": strays(b="clock", c="clock"), "shape": strays("other", "base", a="digits")}
    assert moved_prompts(before, after) == [
        Moved("digits", "a", "what is a", "base", "digits"),
        Moved("digits", "c", "what is c", "digits", "clock"),
    ], "of prompts that both were evaluated on"
    assert moved_prompts(after, after) == []
    assert strays(a="clock", b="later").retiring("clock") == strays(a="base", b="later")
    assert strays(a="clock", b="base").retiring("digits") == strays(own="base", a="clock")


def test_strays_survive_retiring(start: ModelVersion, extend: Callable[..., ModelVersion], experiment: str) -> None:
    version = extend(start, "clock")
    assert strays_of(version) is None
    keep_strays(version, {"digits": Strays("d", "digits", [RoutedPrompt("a", "q", "clock")])})
    with tracked_run(experiment, "retire", "retire"):
        made = retire_expert(version, "clock")
    noted = strays_of(made)
    assert noted == {"digits": Strays("d", "digits", [RoutedPrompt("a", "q", "base")])}
    place = Path(logged_model(made).artifact_location.removeprefix("file://")) / "evaluation" / "strays.json"
    place.write_text(place.read_text()[:-9])
    with pytest.raises(RegistryError, match=r"is damaged: .*strays\.json cannot be read .*; delete that file"):
        strays_of(made)
