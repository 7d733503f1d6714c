"""What travels with a command, without a cluster."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import JOBS, app
from jobs.submission import JobFiles
from jobs.submit_options import without_options
from pipeline.config import LearnConfig, PredictConfig

STREAM = """
extends: ../base.yaml
name: meters
stream:
  tasks:
    - {name: first, train: rows/train.jsonl, eval: rows/*.jsonl}
  base_prompts: /mnt/shared/prompts.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody who has installed the project, and no checkout of it."""
    (tmp_path / "base.yaml").write_text("expert: {rank: 4}\nregistry: {uri: 'http://me:hunter2@mlflow:5000'}\n")
    mine = tmp_path / "mine"
    for place, content in {
        "stream.yaml": STREAM,
        "rows/train.jsonl": '{"question": "?", "image": "photos/1.png"}\n{"image": "photos/missing.png"}\n',
        "rows/eval.jsonl": "{}\n",
        "rows/photos/1.png": "png",
        "rows/photos/2.png": "png",
        "notes.txt": "stays here",
    }.items():
        (mine / place).parent.mkdir(parents=True, exist_ok=True)
        (mine / place).write_text(content)
    monkeypatch.chdir(mine)
    return mine


def test_a_configuration_travels_as_one_file_with_the_files_it_names(folder: Path) -> None:
    files = JobFiles()
    name = files.config(Path("stream.yaml"), ["expert.steps=3"], LearnConfig)
    assert name == "stream.yaml"
    sent = yaml.safe_load(files.package._written[name][0])
    assert "extends" not in sent
    assert sent["expert"] == {"rank": 4, "steps": 3}
    (task,) = sent["stream"]["tasks"]
    assert (task["train"], task["eval"]) == ("files/rows/train.jsonl", "files/rows/*.jsonl")
    assert sent["stream"]["base_prompts"] == "/mnt/shared/prompts.jsonl"
    rows = {"files/rows/train.jsonl", "files/rows/eval.jsonl", "files/rows/photos/1.png"}
    assert set(files.package.sizes) == {"stream.yaml"} | rows


def test_a_space_travels_wherever_it_lies(folder: Path) -> None:
    files = JobFiles()
    (folder.parent / "space.yaml").write_text("expert.rank: [4, 8]\n")
    assert files.text(folder.parent / "space.yaml", "space") == "space/space.yaml"
    assert files.package._written["space/space.yaml"][0] == b"expert.rank: [4, 8]\n"
    assert files.settings == ["expert.rank: [4, 8]\n"], "another space is another job"


def test_names_that_are_no_files_here_stay(folder: Path) -> None:
    files = JobFiles()
    for name in ("OpenGVLab/InternVL2-2B", "tiny", "s3://bucket/rows", "/mnt/rows", "~/rows", "demo://digits/train"):
        assert files.path(name) == name
    assert files.path("../base.yaml") == "files/up/base.yaml"
    assert files.override("source.image_root=rows/photos", PredictConfig) == 'source.image_root="files/rows/photos"'
    assert files.override("evaluation.workers=2", PredictConfig) == "evaluation.workers=2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learn", "stream.yaml", "--env", "X"], "--env, --env-file, --detach and --package-limit need --address"),
        (["learn", "stream.yaml", "--address", "ray://x:1"], "jobs go to the dashboard's address"),
        (["learn", "stream.yaml", "--address", "http://x:1", "--env", "NO_SUCH"], "--env NO_SUCH: neither"),
        (["learn", "stream.yaml", "--address", "http://x:1", "--package-limit", "1MiB"], "more than --package-limit"),
        (["learn", "stream.yaml", "--address", "http://x:1", "--package-limit", "x"], "write it like 80MiB"),
        (["learn", "stream.yaml", "expert.rnk=1", "--address", "http://x:1"], "did you mean `expert.rank`"),
        (["jobs", "list", "--address", "x:1"], "jobs go to the dashboard's address"),
    ],
)
def test_mistakes_are_one_message(folder: Path, words: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output
    assert "hunter2" not in outcome.output


def test_options_for_submitting_are_in_the_help() -> None:
    for command in ("learn", "compare", "add", "sweep", "recompute-statistics", "predict"):
        printed = CliRunner().invoke(app, [command, "--help"]).output
        assert all(option in printed for option in ("--address", "--env", "--env-file", "--detach", "--package-limit"))
    assert "--detach" not in CliRunner().invoke(app, ["plan", "--help"]).output


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--steps", "3", "--address", "http://x:1", "--env", "A", "--env=B"], ["--steps", "3"]),
        (["--detach", "models/a", "--package-limit=9MiB", "b"], ["models/a", "b"]),
        (["--env-file", ".env", "--output", "--address"], ["--output"]),
    ],
)
def test_a_command_without_a_configuration_is_submitted_as_it_is_typed(words: list[str], kept: list[str]) -> None:
    look = JOBS["pretrain-tiny"].look
    assert look is not None
    command = look("pretrain-tiny")
    options = [param for param in command.params if param.name != "help"]
    assert without_options(words, options) == kept
    outcome = CliRunner().invoke(app, ["pretrain-tiny", "--output", "base", "--address", "ray://x"])
    assert (outcome.exit_code, "jobs go to the dashboard's address" in outcome.output) == (2, True), outcome.output
