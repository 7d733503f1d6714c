"""The command as a user types it."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from jobs.cli import app
from tests.models.original import small_config, write_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_folder(tmp_path / "InternVL2-2B", small_config())
    return tmp_path / "InternVL2-2B"


def test_it_says_what_it_made_and_how_to_use_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    outcome = CliRunner().invoke(app, ["convert-internvl2", str(source), str(target)])
    assert outcome.exit_code == 0, outcome.output
    model = AutoModelForImageTextToText.from_pretrained(target)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert "  InternVL2-2B: 0.00 of 0.00 GB\n" in outcome.output
    assert f"converted  {source} -> {target}\n" in outcome.output
    assert f"weights    {parameters:,} parameters, 0.00 GB in 1 file, " in outcome.output
    assert f"use it as  base.path={target}\n" in outcome.output


def test_files_are_as_large_as_asked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    command = ["convert-internvl2", str(source), str(target), "--shard-gb"]
    assert CliRunner().invoke(app, [*command, "0"]).exit_code == 2
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert weights < 1e6
    outcome = CliRunner().invoke(app, [*command, "0.001"])
    assert outcome.exit_code == 0, outcome.output
    assert [file.name for file in target.glob("*.safetensors")] == ["model.safetensors"]


def test_mistakes_are_one_line_and_exit_code_2(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    target.mkdir()
    (target / "mine.txt").write_text("")

    def run(*words: str) -> str:
        outcome = CliRunner().invoke(app, ["convert-internvl2", *words])
        assert outcome.exit_code == 2, outcome.output
        assert outcome.output.startswith("error: ")
        assert outcome.output.count("\n") == 1, outcome.output
        return outcome.output

    assert "not empty; name another folder, or replace it with --force" in run(str(source), str(target))
    assert "no such folder" in run(str(tmp_path / "none"), str(tmp_path / "new"))
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["architectures"] = ["MambaForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    assert "llm_config.architectures: language tower 'MambaForCausalLM' is not" in run(
        str(source), str(tmp_path / "new")
    )
    assert not (tmp_path / "new").exists()
