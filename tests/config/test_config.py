"""What the fields of a configuration allow, and the names that results take from them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import (
    AddConfig,
    BaseModelConfig,
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
from pipeline.config.addresses import working_folder
from pipeline.config.loading import aliases_of
from pipeline.files import user_cache
from tests.config.streams import STREAM, error_of, task

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
TASK, SPACE = CONFIGS / "task.yaml", CONFIGS / "space.yaml"
SHIPPED = sorted(set(CONFIGS.glob("*.yaml")) - {TASK, SPACE})


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


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ExpertConfig().rank = 2


@pytest.mark.parametrize("name", ["null", "base", "default", "lora_", "lora", "a"])
def test_reserved_task_names(file, name):
    assert f"'{name}' is reserved; choose another task name" in error_of(file, task(name=f"'{name}'"))


@pytest.mark.parametrize("name", ["", "Digits", "7up", "a-b", "a/b", "x" * 49])
def test_task_names_are_safe_as_folder_names(name):
    with pytest.raises(ValueError, match="use a lower-case letter first"):
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


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file://elsewhere/runs", "write file:///folder, with three slashes"),
        (
            "s4://bucket/runs",
            r"nobody knows s4:// (s3://, gs:// and what pyarrow and fsspec reach); did you mean s3?",
        ),
        ("s3://", "name a place there, like s3://bucket/runs"),
        ("s3:///?region=x", "name a place there, like s3://bucket/runs"),
        ("s3:///bucket/runs", "name a place there, like s3://bucket/runs"),
        ("s3:/bucket/runs", "an address has two slashes after its kind: s3://bucket/runs"),
        ("s3://bucket/runs/../other", "a store takes `//`, `.` and `..` for names; write its path without them"),
        ("s3://key:a/b@bucket/a%2F..%2Fb", "a store takes `//`, `.` and `..` for names; write its path without them"),
        ("s3://bucket//runs", "a store takes `//`, `.` and `..` for names; write its path without them"),
        ("s3://bucket/my runs/ü?region=x", "write what a URI cannot hold with %: s3://bucket/my%20runs/%C3%BC"),
        ("s3://bucket/runs#old?region=x", "write what a URI cannot hold with %: s3://bucket/runs%23old"),
        ("https://bucket.s3.amazonaws.com/runs", "nothing can be written at https://; name a store, like s3://bucket"),
    ],
)
def test_an_address_that_nobody_knows_is_refused(file, output, reason):
    error = error_of(file, STREAM, f"output={output}", "registry.uri=http://mlflow:5000")
    assert "output: " in error
    assert reason in error


@pytest.mark.parametrize("output", ["s3://bucket/runs", "gs://bucket/runs", "az://bucket/runs", "memory://x"])
def test_results_may_go_to_an_address(file, output):
    file.write_text(STREAM)
    config = load_config(file, [f"output={output}", "registry.uri=http://mlflow:5000"], LearnConfig)
    assert config.output == output
    assert config.folder.parent == config.output_folder
    assert config.output_folder.is_relative_to(user_cache("outputs"))


def test_working_folders_differ_by_place_not_by_keys():
    one = working_folder("s3://bucket/runs")
    assert working_folder("s3://key:secret@bucket/runs/?region=x") == one
    assert working_folder("s3://bucket/others") != one
    assert "secret" not in str(working_folder("s3://key:secret@bucket/runs?token=secret"))


def test_a_database_does_not_go_to_an_address(file):
    error = error_of(file, STREAM, "output=s3://key:secret@bucket/runs")
    assert "output=s3://bucket/runs cannot hold MLflow's database; let registry.uri be" in error
    assert "secret@" not in error


def test_a_file_uri_is_its_path(file):
    file.write_text(STREAM)
    assert load_config(file, ["output=file:///out"], LearnConfig).folder == Path("/out/demo")


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
