"""Learning with results at an address, on a server that speaks S3: nothing that workers write goes to the driver's folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.benchmark.tools.s3_server import KEY, SECRET, new_bucket, s3_server
from jobs.cli import app
from pipeline.config import LearnConfig, load_config
from pipeline.learning.run_status import runs_at
from pipeline.storage.remote import RemoteFolder

pytestmark = pytest.mark.ray


@pytest.fixture
def output() -> Iterator[str]:
    with s3_server() as (address, options):
        yield f"s3://{KEY}:{SECRET}@{new_bucket(address)}/runs{options}"


def stream(tiny_folder: Path, folder: Path, output: str) -> Path:
    """One task of a few steps, whose rows are copied and streamed, and whose image features are kept."""
    task = {
        "name": "digits",
        "train": {"path": "demo://digits/train", "limit": 32},
        "eval": {"path": "demo://digits/eval", "limit": 8},
        "validation": 0.2,
    }
    config = {
        "name": "mini",
        "output": output,
        "base": {"path": str(tiny_folder), "name": "untrained"},
        "stream": {"tasks": [task]},
        "data": {"vision_cache": "features", "cache": "none"},
        "expert": {"steps": 4, "batch_size": 8, "rank": 2, "validate_every": 2},
        "router": {"steps": 2, "kind": "two_level"},
        "training": {"cpus_per_worker": 1, "checkpoint_every": 2},
        "evaluation": {"max_new_tokens": 1},
        "registry": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    file = folder / "mini.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def learn(config: Path) -> str:
    outcome = CliRunner().invoke(app, ["learn", str(config)])
    assert outcome.exit_code == 0, outcome.output[-3000:]
    return outcome.output


def test_a_stream_is_learned_at_an_address_and_taken_up_elsewhere(
    tiny_folder: Path, output: str, tmp_path: Path, monkeypatch
) -> None:
    file, there = stream(tiny_folder, tmp_path, output), RemoteFolder(output)

    def machine(name: str) -> LearnConfig:
        monkeypatch.setattr("pipeline.config.addresses.user_cache", lambda folder: tmp_path / name / folder)
        return load_config(file, [], LearnConfig)

    here = machine("one").output_folder
    printed = learn(file)
    assert f"summary    {there}/mini/summary.json" in printed
    assert SECRET not in printed
    names = set(there.files())
    summary = json.loads(there.read("mini/summary.json"))
    (digest,) = (expert["digest"] for expert in json.loads(there.read("mini/pool/pool.json"))["experts"])
    assert {f"experts/{digest}/expert.json", f"experts/{digest}/contents.json", "mini/report.html"} < names
    assert {name.split("/")[1] for name in names if name.startswith("data/")} == {
        "answers",
        "prompts",
        "demo",
        "features",
    }
    assert not [name for name in names if name.startswith(("mini/training/session", "mini/claims"))]
    assert [run.state for run in runs_at(there)] == ["finished"]
    of_workers = [path for path in (here / "data" / "features", here / "mini" / "training") if path.exists()]
    assert {file.parts[-2] for path in of_workers for file in path.rglob("*.*")} <= {"expert", "finished"}, (
        "only the finished training was fetched"
    )
    for text in here.rglob("*.json"):
        assert SECRET not in text.read_text()

    machine("two")
    printed = learn(file)
    assert "learned before" in printed
    assert json.loads(there.read("mini/summary.json"))["accuracy_matrix"] == summary["accuracy_matrix"]
    assert json.loads(there.read("mini/summary.json"))["answers"] == summary["answers"], "no answer was generated again"
