"""One more task for a registered pool, as users add it: elsewhere, with nothing but the registry.

What happens where two people add: `tests/registry/test_merging.py`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.evaluation.recorded import evaluate_recorded
from pipeline.registry.promotion import champion
from pipeline.registry.scores import scores_of
from pipeline.registry.strays import strays_of
from pipeline.registry.successors import open_pool
from pipeline.registry.versions import get_version, versions_of
from tests.jobs.test_learn import ROOT, learn_here, stream

pytestmark = pytest.mark.ray

POOL = "untrained.pool.mini"

CLOCK = {
    "name": "clock",
    "train": {"path": "demo://clock/train", "limit": 64},
    "eval": {"path": "demo://clock/eval", "limit": 16},
}


def words(folder: Path, task: dict, *more: str) -> list[str]:
    """Returns the command's words."""
    file = folder / f"{task['name']}.yaml"
    file.write_text(yaml.safe_dump({"task": task, "output": str(folder)}))
    pool = ["--pool", f"models:/{POOL}@champion", "--registry", mlflow.get_tracking_uri()]
    return [str(file), *pool, "training.cpus_per_worker=1", *more]


def test_a_task_is_added_from_the_registry_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's folder, its data and the base's folder are gone before."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    config = stream(base, tmp_path / "first")
    settings = yaml.safe_load(config.read_text())
    del settings["stream"]["tasks"][1]
    config.write_text(yaml.safe_dump(settings))
    learn_here(config)
    for name in ("mini", "data", "experts"):
        shutil.rmtree(config.parent / name)
    shutil.rmtree(base)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(f"sqlite:///{config.parent / 'mlflow.db'}")
    before = champion(POOL)
    assert before is not None

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [sys.executable, "-m", "jobs.add", *words(folder, CLOCK, "registry.promote=manual")]
    added = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert added.returncode == 0, added.stdout[-3000:] + added.stderr[-3000:]
    assert "registry   untrained.pool.mini/2, evaluated" in added.stdout
    assert champion(POOL).version == before.version, "nobody has decided"
    newest = versions_of(POOL)[0]
    made = open_pool(newest)
    assert made.pool.names == ["digits", "clock"]
    assert made.references["digits"] == open_pool(before).references["digits"]
    learned = json.loads((folder / "mini-clock" / "summary.json").read_text())
    card = made.pool.experts["clock"].card
    assert (card.rank, learned["expert"]) == (4, "untrained.expert.clock/1"), "as the pool's other experts"
    assert card.base_fingerprint == made.pool.base_fingerprint

    kept = made.evaluated_on(before)
    assert set(kept) == {"digits", "clock", "repeat"}, "the next one is measured on all of them"
    recorded = evaluate_recorded(made.pool, {name: evaluated.prompts for name, evaluated in kept.items()})
    scores = {score.dataset: score.accuracy for score in scores_of(newest)}
    assert {"digits", "repeat"} <= set(scores), "nobody had their data"
    assert {name: recorded.evaluation.accuracies()[name] for name in scores} == pytest.approx(scores)
    assert set(strays_of(newest) or {}) == set(scores)

    refused = CliRunner().invoke(app, ["add", *words(folder, CLOCK | {"prompt": "tell me: {question}"})])
    assert refused.exit_code == 2
    assert "has an expert of that name already, untrained.expert.clock version 1, learned otherwise" in refused.output
    assert "--replace" in refused.output
    assert get_version("untrained.expert.clock", "latest").version in (1, "1"), "nothing was trained for it"
