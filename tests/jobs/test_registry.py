"""The commands that look at the registry and decide what is in use, over a registry with two pool versions."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import BaseModelConfig
from pipeline.registry import browsing
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import register_pool
from pipeline.registry.scores import Score, log_scores
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import get_version, log_folder, logged_model
from pipeline.routing import Pool
from tests.registry.conftest import Created, MakeExpert, created, make_expert, make_pool, new_experiment

__all__ = ["created", "make_expert", "make_pool"]


@pytest.fixture(scope="module")
def uri(
    created: Created,
    make_expert: MakeExpert,
    make_pool: Callable[..., Pool],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Version 1 of pool `demo` holds `digits`, version 2 `digits`, trained again, and `clock`; both have scores."""
    folder = tmp_path_factory.mktemp("registry")
    experiment = new_experiment(created, folder / "store")
    base = BaseModelConfig(path=str(tiny_folder))
    experts = [make_expert("digits", "e1"), make_expert("digits", "e2"), make_expert("clock", "e3")]
    with tracked_run(experiment, "demo", "run") as run:
        versions = [register_expert("untrained", e.save(folder / e.card.config_digest)) for e in experts]
        first = register_pool(make_pool(experts[0]), base, name="demo", digest="p1", experts={"digits": versions[0]})
        both = {"digits": versions[1], "clock": versions[2]}
        second = register_pool(make_pool(*experts[1:]), base, name="demo", digest="p2", experts=both)
        log_scores(run, first, [Score("digits", "d", 0.75, 0.28), Score("shape", "s", 0.9, 0.9, True)])
        log_scores(run, second, [Score("digits", "d", 0.7, 0.28), Score("shape", "s", 0.9, 0.9, True)])
    yield mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("")


def pointsman(*words: str) -> Result:
    return CliRunner().invoke(app, ["registry", *words])


def read(uri: str, *words: str) -> Any:
    outcome = pointsman(*words, "--json", "--registry", uri)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def test_the_list_has_pools_experts_and_bases(uri: str) -> None:
    models = read(uri, "list")
    assert [m["model"] for m in models] == [
        "untrained.pool.demo", "untrained.expert.clock", "untrained.expert.digits", "untrained.base",
    ]  # fmt: skip
    assert [m["latest"] for m in models] == [2, 1, 2, 1]
    assert [m["model"] for m in read(uri, "list", "--kind", "pool", "--base", "untrained")] == ["untrained.pool.demo"]
    assert read(uri, "list", "--base", "other") == []
    printed = pointsman("list", "--registry", uri).output
    assert "untrained.expert.digits" in printed


def test_a_version_is_shown_with_scores_and_experts(uri: str) -> None:
    for address in ("untrained.pool.demo/1", "models:/untrained.pool.demo/1"):
        version = read(uri, "show", address)
        assert (version["model"], version["version"]) == ("untrained.pool.demo", 1)
        assert version["scores"][0] == {
            "dataset": "digits", "digest": "d", "accuracy": 0.75, "base_accuracy": 0.28, "ability": False,
        }  # fmt: skip
        assert version["experts"] == {"digits": "untrained.expert.digits/1"}
        assert version["parameters"]["digest"] == "p1"
    assert read(uri, "show", "untrained.expert.digits")["version"] == 2, "the newest where none is champion"
    printed = pointsman("show", "untrained.pool.demo", "--registry", uri).output
    for part in ("untrained.pool.demo version 2", "0.700", "untrained.expert.clock/1", "router.kind"):
        assert part in printed


def test_two_versions_side_by_side(uri: str) -> None:
    between = read(uri, "diff", "untrained.pool.demo/1", "untrained.pool.demo/2")
    assert between["scores"] == [["digits", 0.75, 0.7], ["shape", 0.9, 0.9]]
    assert between["added"] == ["clock"]
    assert between["replaced"] == {"digits": ["untrained.expert.digits/1", "untrained.expert.digits/2"]}
    printed = pointsman("diff", "untrained.pool.demo/1", "untrained.pool.demo/2", "--registry", uri).output
    assert "-0.050" in printed
    assert "1 of 2 accuracies are equal" in printed
    assert "experts added: clock" in printed


def test_promoting_and_rolling_back(uri: str) -> None:
    model = "untrained.pool.demo"
    assert read(uri, "promote", model, "1") == {"model": model, "champion": 1, "before": None}
    assert "champion is version 2 (was version 1)" in pointsman("promote", model, "--registry", uri).output
    assert read(uri, "show", model)["aliases"] == ["champion"]
    assert read(uri, "rollback", model) == {"model": model, "champion": 1, "before": 2}
    assert read(uri, "show", model)["version"] == 1
    (listed,) = read(uri, "list", "--kind", "pool")
    assert (listed["latest"], listed["champion"], listed["tagged"], listed["tags"]["tasks"]) == (2, 1, 1, "digits")


def test_an_expert_retires(uri: str) -> None:
    """The other tasks keep their scores; asked twice, it happens once."""
    model = "untrained.pool.demo"
    pointsman("promote", model, "2", "--registry", uri)
    made = read(uri, "retire", model, "digits")
    assert made == {"model": model, "version": 3, "before": 2, "champion": True}
    version = read(uri, "show", model)
    assert (version["version"], version["aliases"]) == (3, ["champion"])
    assert version["tags"] == {"tasks": "clock", "status": version["tags"]["status"], "base_kept": "1.00"}
    assert version["tags"]["status"].startswith("promoted ")
    assert version["retired"] == ["digits"]
    assert read(uri, "diff", f"{model}/2", f"{model}/3")["retired"] == ["digits"]
    assert "experts in use again: digits" in pointsman("diff", f"{model}/3", f"{model}/2", "--registry", uri).output
    assert [score["dataset"] for score in version["scores"]] == ["shape"]
    assert "**Retired:** digits; the base answers in their place." in version["description"]
    loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion").unwrap_python_model().routed
    assert loaded.pool.retired == ("digits",)
    assert read(uri, "rollback", model)["champion"] == 2
    assert read(uri, "retire", model, "digits")["version"] == 3
    for expert, message in (
        ("later", "has no expert 'later'; there are: digits, clock"),
        ("digits", "is retired"),
    ):
        outcome = pointsman("retire", model, expert, "--registry", uri)
        assert outcome.exit_code == 2
        assert message in outcome.output


def test_what_lacks_something_does_not_become_champion(uri: str) -> None:
    """A pool's card, or an expert's files; and what others have registered under a name like ours."""
    mlflow.set_tracking_uri(uri)
    model, client = "untrained.pool.demo", mlflow.MlflowClient()
    pointsman("promote", model, "2", "--registry", uri)
    for name, number, file, message in (
        (model, 1, "artifacts/pool/pool.json", "untrained.pool.demo/1 is damaged: "),
        ("untrained.expert.digits", 1, "", "needs untrained.expert.digits/1, which is damaged: "),
    ):
        place = Path(logged_model(get_version(name, number)).artifact_location.removeprefix("file://")) / file
        place.rename(place.with_name("away"))
        outcome = pointsman("promote", model, "1", "--registry", uri)
        shown = pointsman("show", f"{model}/1", "--registry", uri)
        place.with_name("away").rename(place)
        assert (outcome.exit_code, message in outcome.output) == (2, True), outcome.output
        assert (shown.exit_code, "0.750" in shown.output) == (0, True), shown.output
    file = "adapter_model.safetensors"
    location = logged_model(get_version("untrained.expert.clock", 1)).artifact_location
    place = Path(location.removeprefix("file://")) / file
    whole = place.read_bytes()
    place.write_bytes(whole[:-9])
    outcome = pointsman("promote", model, "2", "--registry", uri)
    place.write_bytes(whole)
    assert outcome.exit_code == 2, outcome.output
    assert f"{file} has {len(whole) - 9} bytes instead of {len(whole)}; bring them back" in outcome.output
    run = read(uri, "show", model)["run_id"]
    foreign = client.create_logged_model("1", "foreign", run)
    client.create_registered_model("x.pool.y")
    client.create_model_version("x.pool.y", f"models:/{foreign.model_id}", run, model_id=foreign.model_id)
    outcome = pointsman("promote", "x.pool.y", "1", "--registry", uri)
    assert (outcome.exit_code, "was not registered by this project" in outcome.output) == (2, True), outcome.output
    assert "x.pool.y" not in [each["model"] for each in read(uri, "list")]
    assert read(uri, "gc", "--older-than", "0")["found"] == [], "nor does it hinder"
    assert read(uri, "show", model)["version"] == 2


def test_what_no_pool_needs_is_shown_before_it_is_deleted(uri: str, make_expert: MakeExpert, tmp_path: Path) -> None:
    """An expert that no pool refers to, and what a killed process has uploaded; what is young stays."""
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run(run_id=read(uri, "show", "untrained.base")["run_id"]):
        register_expert("untrained", make_expert("later", "e9").save(tmp_path / "later"))
        lost = log_folder("lost", tmp_path / "later", {"digest": "x"}, model_type="expert")
    assert read(uri, "gc") == {"found": [], "deleted": 0}
    found = read(uri, "gc", "--older-than", "0")["found"]
    assert [(each["name"], each["why"]) for each in found] == [
        (lost, "upload of lost without a version"),
        ("untrained.expert.later/1", "no pool refers to it"),
    ]
    assert all(each["bytes"] > 1000 for each in found)
    declined = CliRunner().invoke(app, ["registry", "gc", "--older-than", "0", "--registry", uri], input="n\n")
    assert "delete them?" in declined.output
    assert len(read(uri, "gc", "--older-than", "0")["found"]) == 2
    assert "2 deleted" in pointsman("gc", "--older-than", "0", "--yes", "--registry", uri).output
    assert read(uri, "gc", "--older-than", "0")["found"] == []
    assert read(uri, "show", "untrained.expert.digits/1")["version"] == 1, "pool version 1 refers to it"


def test_there_is_nothing_to_migrate(uri: str) -> None:
    assert "nothing to do" in pointsman("migrate", "--dry-run", "--registry", uri).output


def test_of_many_models_some_are_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "NAMED", 1)
    outcome = pointsman("show", "nothing", "--registry", uri)
    assert re.search(r"there are \S+ and \d+ more: `pointsman registry list` has all", outcome.output), outcome.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing"], "no model 'nothing' in the registry; there are"),
        (["show", "untrained.pool.demo/9"], "no '9' in 'untrained.pool.demo'; there are versions 1, 2"),
        (["show", "untrained.pool.demo@best"], "no 'best' in 'untrained.pool.demo'"),
        (["diff", "untrained.pool.demo/1", "untrained.expert.digits/1"], "untrained.expert.digits/1 is no pool"),
        (["promote", "untrained.expert.digits"], "'untrained.expert.digits' is no pool; pools are called"),
        (
            ["promote", "untrained.pool.other"],
            "no model 'untrained.pool.other' in the registry; there are untrained.",
        ),
        (
            ["rollback", "untrained.pool.demo/1"],
            "'untrained.pool.demo/1' names a version; name the pool alone, like untrained",
        ),
        (["show", "x'y"], 'no model "x\'y" in the registry'),
        (["show", "untrained.pool.demo/99999999999999999999"], "names no version; write it like"),
        (["migrate", "--base", "other"], "no experts of an earlier release for base 'other'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(uri: str, words: list[str], message: str) -> None:
    outcome = pointsman(*words, "--registry", uri)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output
    assert len(outcome.output.strip().splitlines()) == 1


def test_a_registry_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    outcome = pointsman("list")
    assert outcome.exit_code == 2
    assert f"{tmp_path}/runs/mlflow.db does not exist: `pointsman learn` makes it" in outcome.output
    assert not (tmp_path / "runs").exists()


def test_a_registered_pool_is_explained_with_its_own_base(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ["explain", "--prompt", "repeat : red", "--max-new-tokens", "2", "--pool"]
    outcome = CliRunner().invoke(app, [*ask, "models:/untrained.pool.demo/2", "--registry", uri])
    assert outcome.exit_code == 0, outcome.output
    assert "clock" in outcome.output
    outcome = CliRunner().invoke(app, [*ask, "models:/untrained.pool.demo/9", "--registry", uri])
    assert (outcome.exit_code, outcome.output.count("\n")) == (2, 1)
    assert "no '9' in 'untrained.pool.demo'" in outcome.output
