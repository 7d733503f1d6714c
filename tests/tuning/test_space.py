"""Spaces: read, checked against a configuration before anything starts, and gone through."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ConfigError, LearnConfig
from pipeline.config.loading import load_config
from tuning.space import Space, routing_of, training_of

DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
DEFAULT = DEMO.with_name("space.yaml")


def config(*overrides: str) -> LearnConfig:
    return load_config(DEMO, overrides, LearnConfig)


def space(settings: LearnConfig, *options: str, file: Path | None = None) -> Space:
    return Space.read(file, options).check(settings, settings.stream.tasks[-1])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("expert.rank=4,1000000000000", "expert.rank: Input should be less than or equal to 1024"),
        ("expert.rank=loguniform:4:64", "expert.rank takes whole numbers: write lograndint:4:65"),
        ("expert.rank=randint:0:8", "expert.rank: Input should be greater than or equal to 1"),
        ("expert.dropout=uniform:0:1", "expert.dropout: Input should be less than 1"),
        ("expert.rnk=4", "expert.rnk: no such field; did you mean `expert.rank`?"),
        ("expert.rank", "write it as FIELD=VALUES"),
        ("expert.rank=4,x", "expert.rank: Input should be a valid integer"),
        ("router.kind=prompt,tokens", "router.kind: Input should be 'prompt', 'token' or 'two_level'"),
        ("router.temperature=1,.inf", "router.temperature: Input should be a finite number"),
        ("router.temperature=1,2", "router.temperature has no effect with router.kind prompt, which this pool uses"),
        ("router.feature_width=64,128", "part of the statistics of every expert"),
        ("training.workers=1,2", "training.workers cannot be swept"),
        ("stream.tasks.0=1", "'tasks' is no group of fields"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(option, message):
    with pytest.raises(ConfigError) as raised:
        space(config(), option)
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"--set {option}: ")
    assert message in first


def test_nothing_heavy_is_imported_to_say_so():
    code = "import sys, jobs.sweep; print(*{'ray', 'torch', 'mlflow'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_aliases_are_fields():
    assert space(config(), "expert.r=4,8").names == ["expert.rank"]


def test_values_are_those_that_the_configuration_reads():
    assert space(config(), "expert.learning_rate=1,2").grid(config())[0] == {"expert.learning_rate": 1.0}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("prompt", ["expert.rank", "router.shrinkage"]),
        ("token", ["expert.rank", "router.temperature"]),
        ("two_level", ["expert.rank", "router.temperature", "router.candidates"]),
    ],
)
def test_the_default_space_fits_the_router_in_use(kind, names):
    assert space(config(f"router.kind={kind}"), file=DEFAULT).names == names


def test_router_settings_are_tried_only_where_the_router_reads_them():
    settings = config()
    points = space(settings, "router.temperature=0.5,2", "router.kind=prompt,token").grid(settings)
    assert points == [
        {"router.kind": "prompt"},
        {"router.kind": "token", "router.temperature": 0.5},
        {"router.kind": "token", "router.temperature": 2.0},
    ]


def test_a_condition_is_on_other_fields(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("expert.rank: [4, 64]\nexpert.dropout: {list: [0, 0.1], if: {expert.rank: 64}}\n")
    settings = config()
    points = space(settings, file=file).grid(settings)
    assert [tuple(point.values()) for point in points] == [(4,), (64, 0.0), (64, 0.1)]
    file.write_text("expert.dropout: {list: [0, 0.1], if: {expert.rank: 64}}\nexpert.rank: [4, 64]\n")
    with pytest.raises(ConfigError, match=r"its condition is on expert.rank, which must stand above it"):
        space(settings, file=file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- expert.rank", "must be a mapping of fields to values"),
        ("expert.rank: {normal: [1, 2]}", "expert.rank: no sampler 'normal'"),
        ("expert.rank: {list: [1], choice: [2]}", "expert.rank: one sampler per field"),
        ("expert.rank: {list: [1], if: 3}", "`if` must be a mapping"),
        ("expert.rank: {list: [1], if: {router.kind: tokens}}", "router.kind: Input should be"),
        ("expert.rank: [", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_names_it(tmp_path, text, message):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        space(config(), file=file)
    assert str(raised.value).startswith(f"{file}")
    assert message in str(raised.value)


def test_different_trainings_come_first_so_that_none_waits_for_another():
    settings = config()
    swept = space(settings, "expert.rank=4,8,16", "router.shrinkage=0.02,0.05")
    points = swept.grid(settings)
    assert [point["expert.rank"] for point in points] == [4, 8, 16, 4, 8, 16]
    assert swept.trainings(points, 6) == 3
    assert (training_of(points[0]), routing_of(points[0])) == ({"expert.rank": 4}, {"router.shrinkage": 0.02})


def test_a_shuffled_grid_has_the_same_points_and_different_trainings_first():
    settings = config()
    swept = space(settings, "expert.rank=4,8,16", "expert.steps=25,50,100", "router.shrinkage=0.02,0.05")
    plain, shuffled = swept.grid(settings), swept.grid(settings, shuffled=True)
    assert shuffled == swept.grid(settings, shuffled=True), "a sweep that goes on finds the same order"
    assert sorted(map(repr, shuffled)) == sorted(map(repr, plain))
    first = [repr(training_of(point)) for point in shuffled[:9]]
    assert len(set(first)) == 9
    assert first != [repr(training_of(point)) for point in plain[:9]]


def test_a_grid_has_bounds():
    settings = config()
    many = ",".join(map(str, range(1, 34)))
    with pytest.raises(ConfigError, match="1,089 combinations"):
        space(settings, f"expert.rank={many}", f"expert.steps={many}").grid(settings)
    with pytest.raises(ConfigError, match="a range has no grid"):
        space(settings, "expert.learning_rate=loguniform:1e-4:1e-2").grid(settings)


def test_values_that_do_not_fit_together_are_found():
    settings = config("training.workers=2")
    with pytest.raises(ConfigError, match=r"expert.batch_size is 1 and training.workers 2"):
        space(settings, "expert.batch_size=1,32")


def test_the_seed_of_held_out_rows_stays():
    settings = config()
    task = settings.stream.tasks[-1].model_copy(update={"validation": 0.1})
    with pytest.raises(ConfigError, match="it decides which rows"):
        Space.read(None, ["seed=0,1"]).check(settings, task)


def test_of_a_given_lora_only_the_router_is_swept():
    settings = config()
    task = settings.stream.tasks[-1].model_copy(update={"adapter": "somewhere"})
    with pytest.raises(ConfigError, match="the task's LoRA is given"):
        Space.read(None, ["expert.rank=4,8"]).check(settings, task)
    assert Space.read(None, ["router.shrinkage=0.1,0.2"]).check(settings, task).names == ["router.shrinkage"]
