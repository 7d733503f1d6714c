"""Whatever changes a result changes its name, and nothing else does."""

import json
from pathlib import Path

import pytest

from pipeline.config import LearnConfig, load_config
from pipeline.learning.identity import Identity


@pytest.fixture
def config(tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = str(tmp_path / "rows.jsonl")
    settings = {"stream": {"tasks": [{"name": "hum", "train": source, "eval": source}], "base_prompts": source}}
    (tmp_path / "stream.yaml").write_text(json.dumps(settings))
    return tmp_path / "stream.yaml"


def names(config: Path, *overrides: str, fingerprint: str = "f") -> dict[str, str | None]:
    settings = load_config(config, overrides, LearnConfig)
    identity = Identity(settings, fingerprint, config.parent / "data")
    (task,) = settings.stream.tasks
    return {
        "expert": identity.expert(task),
        "base prompts": identity.base_prompts,
        "rows": identity.encoded_rows(task.eval, task.prompt, answer=False, metric=task.metric),
        "pool": identity.pool(["e"], settings.router),
        "evaluation": identity.evaluation([task], "p", "routed"),
    }


def changed(config: Path, *overrides: str, fingerprint: str = "f") -> set[str]:
    before, after = names(config), names(config, *overrides, fingerprint=fingerprint)
    return {what for what, name in before.items() if after[what] != name}


EVERYTHING = {"expert", "base prompts", "rows", "pool", "evaluation"}


@pytest.mark.parametrize(
    "override",
    ["base.dtype=bfloat16", "base.attention=eager", "base.max_tiles=2", "data.max_pixels=1000", "data.max_tokens=64"],
)
def test_how_a_base_reads_names_all_that_comes_of_it(config: Path, override: str) -> None:
    assert changed(config, override) == EVERYTHING


def test_another_base_names_everything(config: Path) -> None:
    assert changed(config, fingerprint="g") == EVERYTHING


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("expert.rank=4", {"expert"}),
        ("seed=3", {"expert"}),
        ("expert.patience=2", set()),  # nothing is held out
        ("router.statistics_rows=64", {"expert", "base prompts", "pool"}),
        ("router.null_components=3", {"base prompts", "pool"}),
        ("router.temperature=2", {"pool"}),
        ("evaluation.limit=1", {"evaluation"}),
        ("evaluation.max_new_tokens=5", {"evaluation"}),
        ("data.group_by_length=true", {"expert"}),
    ],
)
def test_a_setting_names_what_depends_on_it(config: Path, override: str, what: set[str]) -> None:
    assert changed(config, override) == what


@pytest.mark.parametrize(
    "override",
    [
        "data.num_readers=1",
        "data.cache=none",
        "training.cpus_per_worker=1",
        "training.workers=2",
        "training.zero_stage=2",
        "training.micro_batch=4",
        "training.precision=bf16",
        "training.offload=optimizer",
        "training.placement_strategy=SPREAD",
        "training.node_wait_seconds=5",
        "evaluation.workers=2",
        "evaluation.batch_size=4",
        "stream.on_change=keep",
    ],
)
def test_how_it_is_computed_names_nothing(config: Path, override: str) -> None:
    assert not changed(config, override)


def test_the_metric_names_the_rows_that_it_can_score(config: Path) -> None:
    identity = Identity(load_config(config, [], LearnConfig), "f", config.parent)
    (task,) = identity.config.stream.tasks
    keys = {identity.encoded_rows(task.eval, task.prompt, answer=False, metric=m) for m in ("mmbench", "anls")}
    assert len(keys) == 2


def test_a_source_is_read_once_in_a_run(config: Path) -> None:
    settings = load_config(config, [], LearnConfig)
    identity = Identity(settings, "f", config.parent)
    (task,) = settings.stream.tasks
    before = identity.training_rows(task)
    (config.parent / "rows.jsonl").write_text("{}")
    assert identity.training_rows(task) == before
    assert Identity(settings, "f", config.parent).training_rows(task) != before
