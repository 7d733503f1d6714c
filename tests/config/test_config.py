from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import (
    AddConfig,
    BaseModelConfig,
    ConfigError,
    EvaluationConfig,
    ExpertConfig,
    LearnConfig,
    RouterConfig,
    SourceConfig,
    StreamConfig,
    TaskConfig,
    TrainingConfig,
    digest,
    fields_of,
    load_config,
    without_secrets,
)
from pipeline.config.loading import aliases_of, documented_fields

STREAM = """
stream:
  tasks:
    - {name: digits, train: data/train, eval: data/eval}
"""
TASK = Path(__file__).parents[2] / "jobs" / "configs" / "task.yaml"
SHIPPED = sorted(set((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml")) - {TASK})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "stream.yaml"


def error_of(file: Path, text: str, *overrides: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides, LearnConfig)
    return str(error.value)


def task(**fields) -> str:
    values = {"name": "digits", "train": "a", "eval": "b"} | fields
    return "stream: {tasks: [{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}]}"


def test_a_small_file_is_enough(file):
    file.write_text(STREAM)
    config = load_config(file, [], LearnConfig)
    assert config.stream.tasks[0].train == SourceConfig(path="data/train")
    assert config.expert == ExpertConfig()
    assert config.folder == Path("runs").resolve() / "demo"
    assert config.tracking_uri == f"sqlite:///{Path('runs').resolve()}/mlflow.db"


def test_what_the_file_says_is_in_force(file):
    file.write_text(
        STREAM + "name: mine\noutput: /out\nexpert: {rank: 16}\nregistry: {uri: 'http://mlflow:5000'}\n"
        "base: {path: some/InternVL3_5-1B-HF}\n"
    )
    config = load_config(file, [], LearnConfig)
    assert config.folder == Path("/out/mine")
    assert config.tracking_uri == "http://mlflow:5000"
    assert (config.expert.rank, config.expert.lora_alpha) == (16, 32)
    assert config.base.label == "InternVL3_5-1B-HF"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_config(path, [], LearnConfig).stream.tasks


def test_the_shipped_task_loads():
    assert load_config(TASK, [], AddConfig).task.name == "highest"


def test_overrides_lie_on_top_of_the_file(file):
    file.write_text(STREAM + "expert: {rank: 16}\n")
    overrides = ["expert.rank=4", "expert.learning_rate=1e-3", "training.gpu=true", "router.feature_width=null",
                 "stream.base_prompts=demo://general/train", "seed=7", "name=a=b"]  # fmt: skip
    with pytest.raises(ConfigError, match="name: String should match"):
        load_config(file, overrides, LearnConfig)
    config = load_config(file, overrides[:-1], LearnConfig)
    assert (config.expert.rank, config.training.gpu, config.router.feature_width, config.seed) == (4, True, None, 7)
    assert config.expert.learning_rate == 1e-3
    assert config.stream.base_prompts == SourceConfig(path="demo://general/train")
    assert len(config.stream.tasks) == 1


def test_another_kind_of_configuration_loads_the_same_way(file):
    file.write_text("rank: 2")
    assert load_config(file, ["alpha=3"], ExpertConfig).lora_alpha == 3


def test_names_from_peft_trainer_and_ray_are_accepted(file):
    file.write_text(
        STREAM + "expert: {lora_alpha: 32, max_steps: 7}\ntraining: {num_workers: 2, use_gpu: false}\n"
        "data: {group_by_length: true}\n"
    )
    config = load_config(file, ["expert.lora_alpha=64", "training.cpus_per_worker=3"], LearnConfig)
    assert (config.expert.alpha, config.expert.steps) == (64, 7)
    assert (config.training.workers, config.training.cpus_per_worker, config.data.group_by_length) == (2, 3, True)


def test_aliases_stand_for_fields_that_are_there():
    fields = dict(fields_of(LearnConfig))
    aliases = aliases_of(LearnConfig)
    assert set(aliases.values()) <= fields.keys()
    assert not aliases.keys() & fields.keys()


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


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ExpertConfig().rank = 2


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
        (
            "stream.tasks.0.name=x",
            "override 'stream.tasks.0.name=x': 'tasks' is a list; change its entries in the file",
        ),
        ("expert.rank=[1", "override 'expert.rank=[1': not valid YAML"),
        ("expert.rnk=1", "did you mean `expert.rank`?"),
    ],
)
def test_a_bad_override_is_explained(file, override, message):
    assert message in error_of(file, STREAM + "name: demo\n", override)


@pytest.mark.parametrize("name", ["null", "base", "default", "lora_", "lora", "a"])
def test_reserved_task_names(file, name):
    assert f"'{name}' is reserved; choose another task name" in error_of(file, task(name=f"'{name}'"))


@pytest.mark.parametrize("name", ["", "Digits", "7up", "a-b", "a/b", "x" * 49])
def test_task_names_are_safe_as_folder_names(name):
    with pytest.raises(ValueError, match="pattern"):
        TaskConfig(name=name, eval="b")


def test_a_name_is_given_once(file):
    twice = "stream: {tasks: [{name: digits, train: a, eval: b}], benchmarks: [{name: digits, eval: c}]}"
    assert "task names must differ; twice: digits" in error_of(file, twice)


def test_a_new_task_needs_rows_to_learn_from(file):
    message = error_of(file, "stream: {tasks: [{name: digits, eval: b}]}")
    assert "task 'digits' has no `train` source; only benchmarks go without" in message


def test_a_prompt_template_contains_the_question(file):
    assert "must contain {question}" in error_of(file, task(prompt="'what ?'"))
    assert TaskConfig(name="digits", eval="b", prompt="{question} short .").prompt == "{question} short ."


def test_every_field_has_a_meaning():
    fields = dict(fields_of(LearnConfig, everywhere=True))
    groups = {name.rsplit(".", 1)[0] for name in fields}
    assert [name for name, field in fields.items() if name not in groups and not field.description] == []


def test_fields_are_named_once():
    names = [name for name, _ in fields_of(LearnConfig)]
    everywhere = [name for name, _ in fields_of(LearnConfig, everywhere=True)]
    assert len(everywhere) == len(set(everywhere))
    assert set(names) < set(everywhere)
    assert {"stream.tasks.prompt", "stream.base_prompts.limit", "stream.tasks.train.columns.question"} <= set(
        everywhere
    )


def test_a_digest_depends_on_values_alone():
    stream = StreamConfig(tasks=[TaskConfig(name="digits", train="a", eval="b")])
    assert digest(ExpertConfig(), stream, "x") == digest(ExpertConfig(rank=8), stream.model_copy(), "x")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    digests = [digest(ExpertConfig()), digest(ExpertConfig(rank=4)), digest(RouterConfig()), digest(BaseModelConfig())]
    digests += [digest(ExpertConfig(), 0), digest(ExpertConfig(), 1), digest(1, ExpertConfig())]
    assert len(set(digests)) == len(digests)


def test_digests_stay_as_they_are():
    """Experts in registries are found by their digest: a change here means that all of them train again."""
    assert digest({"seed": 0, "base": "0123"}, [1, 2.5, None]) == "634756d8e178"


def test_a_stream_needs_a_task(file):
    assert "`tasks` is empty, so there is nothing to learn" in error_of(file, STREAM, "stream.tasks=[]")


@pytest.mark.parametrize("output", ["s3://bucket/runs", "gs://bucket/runs", "file://elsewhere/runs"])
def test_results_need_a_file_system(file, output):
    output = error_of(file, STREAM, f"output={output}")
    assert "output: " in output
    assert "mount the storage and name the mounted folder" in output


def test_a_file_uri_is_its_path(file):
    file.write_text(STREAM)
    assert load_config(file, ["output=file:///out"], LearnConfig).folder == Path("/out/demo")


def test_a_file_that_is_no_text_is_told(file):
    file.write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="not valid YAML: .*utf-8"):
        load_config(file, [], LearnConfig)


def test_target_modules_are_a_regular_expression(file):
    assert "expert.target_modules: not a regular expression" in error_of(file, STREAM, "expert.target_modules=(q_proj")


def test_every_worker_has_rows() -> None:
    tasks = {"tasks": [{"name": "one", "train": "a.jsonl", "eval": "b.jsonl"}]}
    settings = {"stream": tasks, "expert": {"batch_size": 4}}
    LearnConfig.model_validate(settings | {"training": {"workers": 4}})
    with pytest.raises(ValueError, match=r"expert\.batch_size is 4 and training\.workers 6"):
        LearnConfig.model_validate(settings | {"training": {"workers": 6}})


@pytest.mark.parametrize(
    "text",
    ["s3://b/k?secret_key=abc", "https://h/x?key=abc", "password: abc", "{'password': 'abc'}", "x?sas=abc&y=1"],
)
def test_keys_are_cut_out_of_any_text(text):
    assert "abc" not in without_secrets(text)


def test_pools_whose_linears_choose_are_evaluated_now_and_then() -> None:
    tasks = [{"name": f"t{n}", "train": "a.jsonl", "eval": "b.jsonl"} for n in range(5)]
    settings = {"stream": {"tasks": tasks}, "evaluation": {"every": 2}}
    actual = {}
    for kind in ("prompt", "two_level", "token"):
        config = LearnConfig.model_validate(settings | {"router": {"kind": kind}})
        actual[kind] = [learned for learned in range(1, 6) if config.is_evaluated(learned)]
    assert actual == {"prompt": [1, 2, 3, 4, 5], "two_level": [2, 4, 5], "token": [2, 4, 5]}


def test_memory_for_experts_is_a_size() -> None:
    assert EvaluationConfig(expert_memory="2GiB").expert_memory == 2 * 2**30
    assert EvaluationConfig(expert_memory=1000).expert_memory == 1000
    for wrong in ("much", "0"):
        with pytest.raises(ValidationError, match="expert_memory"):
            EvaluationConfig(expert_memory=wrong)


@pytest.mark.parametrize("name", ["data", "experts"])
def test_a_run_does_not_take_a_folder_that_all_share(name: str) -> None:
    stream = StreamConfig(tasks=[TaskConfig(name="digits", train="a", eval="b")])
    with pytest.raises(ValidationError, match=f"<output>/{name} is what all runs of an output folder share"):
        LearnConfig(name=name, stream=stream)


@pytest.mark.parametrize(
    ("stage", "offload", "remedy"),
    [(2, "all", "set zero_stage to 3"), (0, "optimizer", "set zero_stage to 1"), (0, "all", "set zero_stage to 3")],
)
def test_only_what_is_sharded_is_offloaded(stage, offload, remedy) -> None:
    with pytest.raises(ValueError, match=remedy):
        TrainingConfig(zero_stage=stage, offload=offload)
    TrainingConfig(zero_stage=3, offload=offload)


def test_what_is_wrong_between_fields_is_said_without_all_that_is_right(file) -> None:
    output = error_of(file, STREAM, "expert.batch_size=2", "training.workers=4")
    assert output.startswith(f"{file}: expert.batch_size is 2 and training.workers 4: ")
    assert "given" not in output
    assert "digits" not in output


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("OpenGVLab/InternVL3_5-8B", "InternVL3_5-8B"),
        ("s3://bucket/models/tuned?endpoint_override=localhost:9000", "tuned"),
        ("/models/my base (new)", "my-base-new-"),
        ("weights/llava.Q4.gguf", "llava.Q4"),
    ],
)
def test_a_base_is_called_in_the_registry_as_its_files_are(path: str, label: str) -> None:
    assert BaseModelConfig(path=path).label == label
    assert BaseModelConfig(path=path, name="mine").label == "mine"


def test_names_that_the_registry_would_misread_are_refused() -> None:
    for settings in ({"path": "a.pool.b"}, {"path": "x", "name": "a.expert"}):
        with pytest.raises(ValueError, match="cannot be the base's name in the registry; set base.name"):
            BaseModelConfig.model_validate(settings)
    for name in ("latest", "v1"):
        with pytest.raises(ValueError, match="is a word of the model registry"):
            TaskConfig.model_validate({"name": name, "eval": "x.jsonl"})
