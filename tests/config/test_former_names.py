"""Configurations that an earlier release shipped: they load, and all that they name keeps its name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import ConfigError, LearnConfig, RouterConfig, StreamConfig, TrainingConfig, digest, load_config
from pipeline.learning.identity import BASE_PROMPT, Identity

BEFORE = Path(__file__).parent / "before"
SHIPPED = Path(__file__).parents[2] / "jobs" / "configs"
NAMES: dict[str, Any] = json.loads((BEFORE / "names.json").read_text())
FINGERPRINT = "0123456789abcdef"


DEMO_BEFORE = ["expert.rank=8", "expert.steps=250", "expert.batch_size=32"]
"""How the demo trained, which has other steps now."""


def config(name: str, folder: Path = BEFORE, overrides: Sequence[str] = ()) -> LearnConfig:
    return load_config(folder / f"{name}.yaml", list(overrides), LearnConfig)


@pytest.mark.parametrize("name", [file.stem for file in sorted(BEFORE.glob("*.yaml"))])
def test_configurations_say_what_they_said(name: str) -> None:
    now = config("demo", SHIPPED, DEMO_BEFORE) if name == "embedded" else config(name, SHIPPED)
    assert config(name) == now


@pytest.mark.parametrize("name", NAMES["settings"])
def test_experts_of_any_stream_keep_their_settings(name: str, tmp_path: Path) -> None:
    identity = Identity(config(name), FINGERPRINT, tmp_path)
    settings = {task.name: digest(identity.settings(task)) for task in identity.config.stream.tasks}
    assert settings == NAMES["settings"][name]


def test_results_of_the_demo_keep_their_names(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Or all would be learned anew."""
    settings = config("embedded")
    identity, stream = Identity(settings, FINGERPRINT, tmp_path_factory.mktemp("demo")), settings.stream
    tasks = {task.name: task for task in (*stream.tasks, *stream.benchmarks)}
    task = tasks["successor"]
    assert task.train is not None
    assert identity.expert(task) == NAMES["expert"]
    assert identity.expert_before(task) == NAMES["expert_before"]
    assert identity.base == NAMES["base"]
    assert identity.answers == NAMES["answers"]
    assert identity.base_prompts == NAMES["base_prompts"]
    assert identity.pool([NAMES["expert"]], settings.router) == NAMES["pool"]
    assert identity.evaluation([task, tasks["repeat"]], "p", "routed") == NAMES["evaluation"]
    assert identity.encoded_rows(task.train, BASE_PROMPT, answer=True, metric="anls") == NAMES["encoded"]


def test_former_values_are_accepted() -> None:
    router = RouterConfig.model_validate({"kind": "token", "token_scores": "published", "short_list": 5})
    assert (router.token_scores, router.candidates) == ("phatgoose", 5)
    assert router.to_identity(include={"token_scores", "candidates"}) == {"token_scores": "published", "short_list": 5}


def test_a_field_and_its_former_name_are_one_too_many() -> None:
    with pytest.raises(ValidationError, match="threads and cpus_per_worker are the same field; remove one of them"):
        TrainingConfig.model_validate({"cpus_per_worker": 2, "threads": 1})


def test_groups_in_lists_are_renamed_too() -> None:
    task = {"name": "chart", "eval": {"path": "a.parquet", "layout": "chartqa"}, "train": "embedded://digits/train"}
    stream = StreamConfig.model_validate({"tasks": [task], "general": "b"})
    assert stream.tasks[0].eval.preset == "chartqa"
    assert stream.tasks[0].train is not None
    assert stream.tasks[0].train.path == "demo://digits/train"
    named = stream.to_identity()
    assert named["tasks"][0]["eval"]["layout"] == "chartqa"
    assert named["general"]["path"] == "b"


def test_the_demos_scheme_renames_no_run() -> None:
    task = {"name": "digits", "train": "demo://digits/train", "eval": "demo://digits/eval"}
    (named,) = StreamConfig.model_validate({"tasks": [task]}).to_identity()["tasks"]
    assert named["train"]["path"] == "embedded://digits/train"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.threads=abc", r"training\.cpus_per_worker \(formerly training\.threads\): "),
        ("training.thread=1", r"did you mean `training\.cpus_per_worker`\?"),
        ("expert.clips=1", r"did you mean `expert\.max_grad_norm`\?"),
        ("expert.lora_alphas=1", r"did you mean `expert\.alpha`\?"),
    ],
)
def test_errors_know_former_names(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(BEFORE / "embedded.yaml", [override], LearnConfig)
