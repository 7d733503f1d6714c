"""From a file and overrides to a configuration, and what is said of mistakes."""

import pytest

from pipeline.config import (
    ConfigError,
    ExpertConfig,
    LearnConfig,
    SourceConfig,
    fields_of,
    load_config,
)
from pipeline.config.loading import documented_fields
from tests.config.streams import STREAM, error_of, task


def test_overrides_lie_on_top_of_the_file(file):
    file.write_text(STREAM + "expert: {rank: 16}\n")
    overrides = ["expert.rank=4", "expert.learning_rate=1e-3", "training.gpu=true", "router.feature_width=null",
                 "stream.base_prompts=demo://general/train", "seed=7", "name=a=b"]  # fmt: skip
    with pytest.raises(ConfigError, match="name: use letters, digits, `_` and `-` only"):
        load_config(file, overrides, LearnConfig)
    config = load_config(file, overrides[:-1], LearnConfig)
    assert (config.expert.rank, config.training.gpu, config.router.feature_width, config.seed) == (4, True, None, 7)
    assert config.expert.learning_rate == 1e-3
    assert config.stream.base_prompts == SourceConfig(path="demo://general/train")
    assert len(config.stream.tasks) == 1


def test_another_kind_of_configuration_loads_the_same_way(file):
    file.write_text("rank: 2")
    assert load_config(file, ["alpha=3"], ExpertConfig).lora_alpha == 3


def test_a_field_and_its_alias_are_one_too_many(file):
    assert error_of(file, STREAM + "expert: {alpha: 8, lora_alpha: 32}\n") == (
        f"{file}: expert.lora_alpha and expert.alpha are the same field; remove one of them"
    )


def test_a_doubled_field_in_a_list_is_named_with_its_place(file):
    tasks = "stream: {tasks: [{name: a, eval: x, train: {path: y, preset: docvqa, layout: docvqa}}]}\n"
    assert "stream.tasks.0.train.layout and stream.tasks.0.train.preset are the same field" in error_of(file, tasks)


def test_a_mistake_is_told_of_the_file_or_the_override_that_makes_it(file, tmp_path):
    (tmp_path / "base.yaml").write_text(STREAM + "expert: {rnk: 2}\n")
    assert error_of(file, "extends: base.yaml\n").startswith(f"{tmp_path / 'base.yaml'}: expert.rnk: no such field")
    assert error_of(file, STREAM, "expert.rnk=2").startswith("override 'expert.rnk=2': expert.rnk: no such field")
    assert error_of(file, STREAM, "expert.rank=0").startswith("override 'expert.rank=0': expert.rank: ")
    (tmp_path / "base.yaml").write_text(STREAM + "expert: {rank: 0}\n")
    assert "expert.rank: " not in error_of(file, "extends: base.yaml\nexpert: {rank: 2}\nsed: 1\n")


def test_names_of_other_libraries_that_mean_something_else_are_answered(file):
    assert "see `training.precision`" in error_of(file, STREAM, "training.bf16=true")
    assert "see `expert.learning_rate`" in error_of(file, STREAM + "expert: {lr: 1}\n")
    file.write_text(STREAM)
    assert load_config(file, ["expert.r=16"], LearnConfig).expert.rank == 16


def test_an_empty_group_can_be_overridden(file):
    file.write_text(STREAM + "expert:\n")
    assert load_config(file, ["expert.rank=4"], LearnConfig).expert.rank == 4


def test_a_field_of_several_types_has_one_error(file):
    message = error_of(file, STREAM, "evaluation.expert_memory=[1]")
    assert ".str" not in message
    assert ".int" not in message


def test_help_has_every_field_of_every_group_once():
    names = [name for name, _ in documented_fields(LearnConfig)]
    assert len(names) == len(set(names))
    assert {"seed", "stream.tasks[].metric", "stream.tasks[].train.columns.answer"} <= {*names}
    shortened = {name.replace("[]", "") for name in names}
    assert shortened <= {name for name, _ in fields_of(LearnConfig, everywhere=True)}


def test_a_file_that_extends_another_says_what_differs(file, tmp_path):
    file.write_text(STREAM + "expert: {rank: 4, steps: 9}\nname: first\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "second.yaml").write_text("extends: ../stream.yaml\nname: second\nexpert: {lora_alpha: 3}\n")
    third = tmp_path / "third.yaml"
    third.write_text(
        "extends: sub/second.yaml\nexpert: {rank: 16}\nstream: {tasks: [{name: clock, train: a, eval: b}]}\n"
    )
    config = load_config(third, ["expert.steps=5"], LearnConfig)
    assert (config.name, config.expert.rank, config.expert.alpha, config.expert.steps) == ("second", 16, 3, 5)
    assert [task.name for task in config.stream.tasks] == ["clock"], "lists are replaced"


def test_a_file_that_cannot_be_extended_is_named(file, tmp_path):
    assert error_of(file, "extends: none.yaml\n") == (
        f"{tmp_path}/none.yaml: no such configuration file, which {file} extends"
    )
    assert error_of(file, "extends: [a, b]\n") == f"{file}: extends: must be the path of one file, found list"
    (tmp_path / "other.yaml").write_text("extends: stream.yaml\n")
    assert error_of(file, "extends: other.yaml\n") == f"{file}: `extends` leads back to stream.yaml; remove one of them"


def test_an_unknown_field_gets_a_suggestion(file):
    assert error_of(file, STREAM + "expert: {ranks: 3}") == (
        f"{file}: expert.ranks: no such field; did you mean `expert.rank`?"
    )
    assert "did you mean `seed`?" in error_of(file, STREAM + "seeds: 1")
    assert "did you mean `router.top_k`?" in error_of(file, STREAM, "router.topk=1")
    assert "`pointsman learn --help` lists the fields" in error_of(file, STREAM + "zzz: 1")


def test_an_unknown_field_of_a_task_gets_a_suggestion(file):
    message = error_of(file, task(metrics="anls"))
    assert "stream.tasks.0.metrics: no such field; did you mean `stream.tasks.metric`?" in message
    message = error_of(file, task(train="{path: a, limt: 3}"))
    assert "stream.tasks.0.train.limt: no such field; did you mean `stream.tasks.train.limit`?" in message


def test_a_wrong_value_comes_with_the_fields_meaning(file):
    message = error_of(file, STREAM + "expert: {rank: many}")
    assert message.startswith(f"{file}: expert.rank: Input should be a valid integer")
    assert "(given: 'many')" in message
    assert "LoRA rank r" in message
    message = error_of(file, STREAM, "router.temperature=0")
    assert "router.temperature: Input should be greater than 0 (given: 0)" in message
    assert "the scores are divided by it before the softmax" in message


def test_a_wrong_value_in_a_task_comes_with_the_fields_meaning(file):
    message = error_of(file, task(metric="f1"))
    assert "stream.tasks.0.metric: Input should be 'exact_match', 'relaxed_accuracy', 'anls', 'mmbench'" in message
    assert "Metric: exact match" in message
    message = error_of(file, task(train="{path: a, limit: 0}"))
    assert "stream.tasks.0.train.limit" in message
    assert "Maximum number of rows" in message
    assert "Name of the task and of its expert" in error_of(file, task(name="Digits"))


def test_all_mistakes_are_listed_at_once(file):
    message = error_of(file, STREAM + "expert: {rank: 0, alpha: -1}\nsed: 1\n")
    assert len([line for line in message.splitlines() if line.startswith(str(file))]) == 3


def test_a_missing_field_is_named(file):
    assert "stream: Field required" in error_of(file, "")
    message = error_of(file, "stream: {}")
    assert "stream.tasks: Field required\n" in message
    assert "in the order in which they are learned" in message


def test_a_file_that_cannot_be_read_is_named(file, tmp_path):
    with pytest.raises(ConfigError, match=r"stream\.yaml: no such configuration file"):
        load_config(file, [], LearnConfig)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_config(tmp_path, [], LearnConfig)
    with pytest.raises(ConfigError, match="it comes first, and FIELD=VALUE after it"):
        load_config("expert.rank=16", [], LearnConfig)


def test_a_file_that_is_no_configuration_is_named(file):
    assert error_of(file, "a: [").startswith(f"{file}: not valid YAML: ")
    assert error_of(file, "- a") == f"{file}: must be a mapping of fields, found list"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("expert.rank", "override 'expert.rank': write it as field.sub=value, e.g. expert.rank=16"),
        ("name.first=x", "override 'name.first=x': 'name' is not a group of fields but 'demo'"),
        ("stream.tasks.7.name=x", "override 'stream.tasks.7.name=x': stream.tasks has no entry '7'; there are: 0 ("),
        ("stream.tasks.nobody.validation=1", "stream.tasks has no entry 'nobody'; there are: 0 ("),
        ("stream.benchmarks[0].limit=1", "stream.benchmarks has no entries; write them into the file"),
        ("expert.rank=[1", "override 'expert.rank=[1': not valid YAML"),
        ("expert.rnk=1", "did you mean `expert.rank`?"),
    ],
)
def test_a_bad_override_is_explained(file, override, message):
    assert message in error_of(file, STREAM + "name: demo\n", override)


@pytest.mark.parametrize("task", ["stream.tasks[0]", "stream.tasks.0", "stream.tasks.{name}"])
def test_an_override_reaches_an_entry_of_a_list_by_number_or_name(file, task) -> None:
    file.write_text(STREAM)
    before = load_config(file, [], LearnConfig).stream.tasks[0]
    task = task.format(name=before.name)
    config = load_config(
        file, [f"{task}.validation=0.5", f"{task}.train.limit=7", f"{task}.eval=other.jsonl"], LearnConfig
    )
    changed = config.stream.tasks[0]
    assert before.train is not None
    assert changed.train == before.train.model_copy(update={"limit": 7})
    assert (changed.name, changed.validation, changed.eval.path) == (before.name, 0.5, "other.jsonl")
    assert error_of(file, STREAM, f"{task}.validation=2").startswith(
        f"override '{task}.validation=2': stream.tasks.0.validation: "
    )


def test_a_file_that_is_no_text_is_told(file):
    file.write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="not valid YAML: .*utf-8"):
        load_config(file, [], LearnConfig)


def test_what_is_wrong_between_fields_is_said_without_all_that_is_right(file) -> None:
    output = error_of(file, STREAM, "expert.batch_size=2", "training.workers=4")
    assert output.startswith(f"{file}: expert.batch_size is 2 and training.workers 4: ")
    assert "given" not in output
    assert "digits" not in output
