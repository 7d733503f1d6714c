"""The frame of experiments: configurations, results that are found again, figures over seeds, pages made of the summary."""

import json
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.experiments.catalogue import CATALOGUE, Entry, described
from jobs.experiments.charts import bars, pairs
from jobs.experiments.experiment import Chart, Experiment, Run, Table, Target, lookup
from jobs.experiments.running import forget, result_file, results_of
from jobs.experiments.seeds import over_seeds, ratio, shown
from jobs.experiments.settings import Settings, stream, task
from pipeline.config import ConfigError
from pipeline.learning.progress import LoggedProgress

computed: list[tuple[str, int]] = []


def made_up(version: int = 1) -> Experiment:
    """An experiment that learns nothing and notes what it computes."""

    def runs(seed, configure):
        def compute(label):
            computed.append((label, seed))
            return {"value": 0.5 + 0.1 * seed, "none": None}

        return [Run(label, seed, None, compute=lambda label=label: compute(label)) for label in ("one", "other")]

    def summarise(results):
        return {label: over_seeds({"value": [r["value"] for r in of]}) for label, of in results.items()}

    def tables(figures):
        rows = [[label, shown(figures[label], "value")] for label in ("one", "other")]
        return [Table("Values", ["run", "value | part"], rows, ours=frozenset({1}))]

    def charts(figures):
        return [
            Chart("values", "Values", "As they are.", lambda: bars(["one"], {"v": pairs([figures["one"]], "value")}))
        ]

    targets = (
        Target("one.value_mean", ">=", 0.9),
        Target("one.value_mean", "<=", "other.value_mean"),
        Target("no.such", ">=", 1),
    )
    return Experiment(version, runs, summarise, tables, charts, targets, notes=("Made up.",))


@pytest.fixture(autouse=True)
def _nothing_computed() -> None:
    computed.clear()


@pytest.fixture
def only_made_up(monkeypatch):
    """The catalogue has one experiment, which is made up."""
    entry = SimpleNamespace(title="Made up", asks="What is it?", minutes=1, load=lambda name: made_up())
    for name in list(CATALOGUE):
        monkeypatch.delitem(CATALOGUE, name)
    monkeypatch.setitem(CATALOGUE, "forgetting", entry)


def all_runs(seeds: int = 3, version: int = 1):
    experiment = made_up(version)
    return experiment, [run for seed in range(seeds) for run in experiment.runs(seed, None)]


def test_results_are_computed_once_and_found_again(tmp_path: Path) -> None:
    experiment, runs = all_runs()
    first = results_of("x", experiment, runs, tmp_path, LoggedProgress())
    assert computed == [("one", 0), ("other", 0), ("one", 1), ("other", 1), ("one", 2), ("other", 2)]
    computed.clear()
    assert results_of("x", experiment, runs, tmp_path, LoggedProgress()) == first
    assert computed == []
    assert [r["value"] for r in first["one"]] == pytest.approx([0.5, 0.6, 0.7])
    assert all(r["seconds"] >= 0 for of in first.values() for r in of)


def test_a_stopped_experiment_goes_on_with_the_run_that_was_not_done(tmp_path: Path) -> None:
    experiment, runs = all_runs()
    results_of("x", experiment, runs[:3], tmp_path, LoggedProgress())
    computed.clear()
    results_of("x", experiment, runs, tmp_path, LoggedProgress())
    assert computed == [("other", 1), ("one", 2), ("other", 2)]


def test_results_of_another_version_or_measured_again_are_not_found(tmp_path: Path) -> None:
    experiment, runs = all_runs(1)
    results_of("x", experiment, runs, tmp_path, LoggedProgress())
    for changes in ({"again": True}, {}):
        computed.clear()
        other, same = (experiment, runs) if changes else all_runs(1, version=2)
        results_of("x", other, same, tmp_path, LoggedProgress(), **changes)
        assert computed == [("one", 0), ("other", 0)]


def test_a_result_is_named_by_what_is_learned_not_by_how(tmp_path: Path) -> None:
    experiment, settings = made_up(), Settings(tmp_path)

    def name(*own: str, seed: int = 0, label: str = "run") -> Path:
        return result_file(
            experiment, Run(label, seed, settings.configure(label, seed, stream([task("digits")]), *own)), tmp_path
        )

    assert name() == name("training.cpus_per_worker=2") == name("registry.promote=manual")
    assert len({name(), name("expert.steps=3"), name(seed=1), name(label="b"), name("evaluation.limit=3")}) == 5


def test_measuring_again_forgets_evaluations_and_nothing_that_was_trained(tmp_path: Path) -> None:
    run = Run("run", 0, Settings(tmp_path).configure("run", 0, stream([task("digits")])))
    state = run.config.folder / "state"
    state.mkdir(parents=True)
    for name in ("evaluation-1.json", "evaluation-2-brief.json", "task-1.json", "clock.json"):
        (state / name).write_text("{}")
    forget(run, tmp_path / "result.json")
    assert sorted(file.name for file in state.iterdir()) == ["clock.json", "task-1.json"]


def test_configurations_are_the_demos_with_the_users_last_word(tmp_path: Path) -> None:
    plain = Settings(tmp_path).configure("label", 2, stream([task("digits")]), "expert.steps=7")
    assert (plain.name, plain.seed, plain.expert.steps, plain.router.feature_width) == ("label-2", 2, 7, None)
    assert plain.folder == tmp_path / "runs" / "label-2"
    small = Settings(tmp_path, ("expert.steps=3",)).configure("label", 2, stream([task("digits")]), "expert.steps=7")
    assert small.expert.steps == 3
    assert small.name.startswith("label-2-"), "beside the run at full size"


@pytest.mark.parametrize("override", ["name=mine", "seed=3", "stream.tasks[0].prompt=x", "output=/else"])
def test_what_experiments_set_themselves_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="experiments set .* themselves"):
        Settings(tmp_path, (override,))


def test_figures_over_seeds() -> None:
    values = [0.2, 0.5, 0.9]
    figures = over_seeds({"a": values, "b": [0.3], "c": [None, 0.1], "d": []})
    assert figures == {"a_mean": pytest.approx(fmean(values)), "a_std": pytest.approx(stdev(values)), "b_mean": 0.3}
    assert shown(figures, "a") == "53.3\u202f% ± 35.1"
    assert (shown(figures, "b"), shown(figures, "c")) == ("30.0\u202f%", "—")
    assert (ratio(1, 2), ratio(None, 2), ratio(1, 0)) == (0.5, None, None)


def test_targets_look_figures_up() -> None:
    figures = {"a": {"b": 0.5}, "c": 0.6}
    assert lookup(figures, "a.b") == 0.5
    assert lookup(figures, "a.b.c") is lookup(figures, "a") is lookup(figures, "d") is None
    assert Target("a.b", ">=", "c").check(figures) == (0.5, 0.6, False)
    assert Target("a.b", "<=", 0.5).check(figures) == (0.5, 0.5, True)
    assert Target("d", "<=", 0.5).check(figures)[2] is None


@pytest.mark.usefixtures("only_made_up")
def test_the_command_writes_summary_page_and_results(tmp_path: Path) -> None:
    command = ["experiment", "all", "--seeds", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "experiments"
    summary = json.loads((folder / "summary.json").read_text())
    part = summary["forgetting"]
    assert part["one"] == {"value_mean": pytest.approx(0.55), "value_std": pytest.approx(stdev([0.5, 0.6]))}
    assert (part["how"]["seeds"], part["how"]["runs"], part["how"]["overrides"]) == ([0, 1], 4, [])
    page = (folder / "forgetting" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'class="missed"' in page, "the first target is missed"
    assert "forgetting.one.value_mean" in page
    results = (folder / "RESULTS.md").read_text()
    assert "| one.value_mean | 0.55 | >= 0.9 | NO |" in results
    assert "| one.value_mean | 0.55 | <= 0.55 (other.value_mean) | yes |" in results
    assert "no.such" not in results, "what was not measured has no row"
    assert "| **other** | **55.0 % ± 7.1** |" in results
    assert "value \\| part" in results
    assert "![Values](forgetting/plots/values.png)" in results
    assert (folder / "forgetting" / "plots" / "values.png").stat().st_size > 1000
    computed.clear()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert computed == []


@pytest.mark.usefixtures("only_made_up")
def test_pages_say_what_was_not_done_at_full_size(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["experiment", "forgetting", "expert.steps=2", "--seeds", "1", "--output", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "Not at full size: `expert.steps=2`" in (tmp_path / "experiments" / "RESULTS.md").read_text()
    assert "Not at full size:" in (tmp_path / "experiments" / "forgetting" / "report.html").read_text()


def test_unknown_experiments_are_refused_with_the_known_ones() -> None:
    done = CliRunner().invoke(app, ["experiment", "forgeting"])
    assert done.exit_code == 2
    assert "forgeting: no such experiment; there are: forgetting, scale," in done.output


def test_help_teaches_what_each_asks_and_costs() -> None:
    help = CliRunner().invoke(app, ["experiment", "--help"]).output
    assert all(line in help for line in described())
    assert all(f"{name}  ({entry.minutes} minutes)" in help for name, entry in CATALOGUE.items())
    assert sum(entry.minutes for entry in CATALOGUE.values()) <= 180
    assert all(entry.minutes <= 40 for entry in CATALOGUE.values())


@pytest.mark.parametrize(("name", "entry"), CATALOGUE.items())
def test_every_experiment_is_there_and_its_runs_can_be_configured(name: str, entry: Entry, tmp_path: Path) -> None:
    experiment = entry.load(name)
    runs = [run for seed in range(3) for run in experiment.runs(seed, Settings(tmp_path).configure)]
    assert len({(run.label, run.seed) for run in runs}) == len(runs)
    for run in runs:
        assert (run.config is None) == (run.measure is None) != (run.compute is None)
        assert run.config is None or (run.config.seed, run.config.name) == (run.seed, f"{run.label}-{run.seed}")
