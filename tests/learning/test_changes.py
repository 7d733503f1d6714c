"""Which expert a task is to have when data or settings are no longer those that it was learned with."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.local import ClusterInfo
from cluster.usage import PeakMemory
from jobs.terminal import Terminal
from pipeline.config import ConfigError, LearnConfig, load_config
from pipeline.data.errors import StreamError
from pipeline.learning.changes import ChangedError, check_tasks, expert_wanted, remember
from pipeline.learning.session import StreamSession
from pipeline.routing.expert import ExpertCard

HERE = ClusterInfo("", True, 4, 0, 1, None, Path(), 0.0)


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    task = {"name": "hum", "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    settings = {"output": str(tmp_path), "base": {"path": str(tiny_folder)}, "stream": {"tasks": [task]}}
    file = tmp_path / "stream.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def opened(config: Path, *overrides: str) -> StreamSession:
    settings = load_config(config, overrides, LearnConfig)
    return StreamSession(settings, HERE, Terminal(), PeakMemory())


def wanted(session: StreamSession) -> str:
    return expert_wanted(session, session.config.stream.tasks[0])


def card(session: StreamSession, digest: str, *, identity: bool = True) -> ExpertCard:
    (task,) = session.config.stream.tasks
    return ExpertCard(
        name="hum",
        task="hum",
        base_fingerprint="f",
        rank=8,
        alpha=16,
        seed=0,
        data_fingerprint="d",
        config_digest=digest,
        identity=session.identity.parts(task) if identity else {},
        samples=1,
    )


@pytest.fixture
def learned(config: Path) -> str:
    """The name of the expert that has been learned."""
    session = opened(config)
    key = wanted(session)
    remember(session, card(session, key))
    return key


def test_how_it_is_computed_changes_nothing(config: Path, learned: str, capsys) -> None:
    other = opened(config, "training.workers=2", "training.zero_stage=2", "training.precision=bf16")
    assert wanted(other) == learned
    assert not capsys.readouterr().out


def test_other_settings_train_again_and_say_which(config: Path, learned: str, capsys) -> None:
    assert wanted(opened(config, "expert.rank=4", "seed=7")) != learned
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "task 'hum' was learned with other data or settings: seed 0 -> 7; expert.rank 8 -> 4; it is trained again"
        in output
    )
    assert "the earlier expert stays in the registry" in output


def test_other_statistics_need_no_training(config: Path, learned: str, capsys) -> None:
    for overrides, messages in ((["router.feature_width=64"], True), (["router.feature_width=64", "seed=7"], False)):
        assert wanted(opened(config, *overrides)) != learned
        assert (
            "`pointsman recompute-statistics` recomputes them" in " ".join(capsys.readouterr().out.split())
        ) is messages


def test_other_data_are_told(config: Path, learned: str, capsys) -> None:
    with (config.parent / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": []}) + "\n")
    assert wanted(opened(config)) != learned
    assert "its data have changed" in capsys.readouterr().out


def test_the_expert_may_be_kept(config: Path, learned: str, capsys) -> None:
    assert wanted(opened(config, "expert.rank=4", "stream.on_change=keep")) == learned
    assert "its expert is kept" in " ".join(capsys.readouterr().out.split())


def test_a_change_may_be_an_error(config: Path, learned: str) -> None:
    with pytest.raises(ChangedError, match=r"expert.rank 8 -> 4; undo the change, or .*stream.on_change=retrain"):
        wanted(opened(config, "expert.rank=4", "stream.on_change=fail"))


def test_data_that_are_gone_are_not_needed(config: Path, learned: str, capsys) -> None:
    (config.parent / "train.jsonl").unlink()
    assert wanted(opened(config)) == learned
    output = " ".join(capsys.readouterr().out.split())
    assert "hum: its training data are gone" in output
    assert "train.jsonl" in output


def test_data_that_are_gone_are_needed_for_other_settings(config: Path, learned: str) -> None:
    (config.parent / "train.jsonl").unlink()
    with pytest.raises(StreamError, match=r"learned with other settings \(expert.rank 8 -> 4\)"):
        wanted(opened(config, "expert.rank=4"))
    assert wanted(opened(config, "expert.rank=4", "stream.on_change=keep")) == learned


def test_data_that_never_were_there_are_an_error(config: Path) -> None:
    (config.parent / "train.jsonl").unlink()
    with pytest.raises(StreamError, match=r"train\.jsonl"):
        wanted(opened(config))


def test_experts_of_earlier_releases_are_recognised(config: Path, capsys) -> None:
    session = opened(config)
    before = session.identity.expert_before(session.config.stream.tasks[0])
    folder = session.folder / "experts" / "hum"
    folder.mkdir(parents=True)
    (folder / "expert.json").write_text(card(session, before, identity=False).model_dump_json(exclude={"identity"}))
    assert wanted(session) == before
    assert not capsys.readouterr().out
    assert wanted(opened(config, "expert.rank=4")) != before
    assert "since an earlier release wrote it" in " ".join(capsys.readouterr().out.split())


def test_a_task_without_files_is_an_error_before_any_is_learned(config: Path, tmp_path: Path) -> None:
    check_tasks(opened(config))
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(StreamError, match=r"^task 'hum', train: .*train\.jsonl: no parquet, jsonl, .* files there"):
        check_tasks(opened(config))


def test_a_mistyped_demo_task_is_an_error_before_any_is_learned(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["stream"]["tasks"][0]["train"] = "demo://digts/train"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(StreamError, match="task 'hum', train: demo://digts/train: no such demo data"):
        check_tasks(opened(config))
    assert not (tmp_path / "data").exists()


def test_missing_prompts_are_an_error_before_any_task_is_learned(config: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["stream"]["benchmarks"] = [{"name": "chart", "eval": str(tmp_path / "chart.jsonl")}]
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(StreamError, match="^benchmark 'chart', eval: "):
        check_tasks(opened(config))
    (tmp_path / "eval.jsonl").rename(tmp_path / "chart.jsonl")
    with pytest.raises(StreamError, match="^task 'hum', eval: "):
        check_tasks(opened(config))
    (tmp_path / "chart.jsonl").rename(tmp_path / "eval.jsonl")
    settings["stream"] |= {"benchmarks": [], "base_prompts": str(tmp_path / "none.jsonl")}
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(StreamError, match="^stream.base_prompts: "):
        check_tasks(opened(config))


def test_target_modules_that_match_nothing_are_an_error_before_any_task_is_learned(config: Path) -> None:
    check_tasks(opened(config, r"expert.target_modules=.*\.down_proj"))
    with pytest.raises(ConfigError, match=r"expert\.target_modules: .* matches the full path of no Linear"):
        check_tasks(opened(config, "expert.target_modules=down_proj"))


def test_files_of_a_learned_task_may_be_gone(config: Path, learned: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").unlink()
    check_tasks(opened(config))


def test_changes_that_must_not_be_end_the_stream_at_once(config: Path, learned: str) -> None:
    check_tasks(opened(config, "stream.on_change=fail"))
    with pytest.raises(ChangedError):
        check_tasks(opened(config, "stream.on_change=fail", "expert.rank=3"))


def test_missing_data_of_a_changed_task_end_the_stream_at_once(config: Path, learned: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(StreamError, match="learned with other settings"):
        check_tasks(opened(config, "expert.rank=3"))


def test_a_notice_comes_once(config: Path, learned: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").unlink()
    session = opened(config, "stream.on_change=fail")
    check_tasks(session)
    assert not capsys.readouterr().out
    wanted(session)
    assert "its training data are gone" in capsys.readouterr().out
