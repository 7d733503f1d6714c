"""The command as a user types it: with a pool of a registry, again, killed, and with mistakes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import BaseModelConfig
from pipeline.registry.experts import register_expert
from pipeline.registry.pools import register_pool
from pipeline.registry.tracking import tracked_run
from pipeline.routing import Pool
from tests.registry.conftest import Created, MakeExpert, created, make_expert, make_pool, new_experiment

__all__ = ["created", "make_expert", "make_pool"]

POOL = "models:/untrained.pool.demo/latest"
QUESTIONS = ["repeat : red", "repeat : blue", "what comes after 3 ?", "which is it ?"]


@pytest.fixture(scope="module")
def uri(
    created: Created,
    make_expert: MakeExpert,
    make_pool: Callable[..., Pool],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A registry with a pool of two experts."""
    folder = tmp_path_factory.mktemp("registry")
    experiment = new_experiment(created, folder / "store")
    experts = [make_expert("digits", "e1"), make_expert("clock", "e2", 3.0)]
    with tracked_run(experiment, "demo", "run"):
        versions = {e.card.name: register_expert("untrained", e.save(folder / e.card.name)) for e in experts}
        base = BaseModelConfig(path=str(tiny_folder))
        register_pool(make_pool(*experts), base, name="demo", digest="p", experts=versions)
    yield mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows [1].jsonl"
    file.write_text("".join(f'{{"q": "{question}"}}\n' for question in QUESTIONS))
    return file


def words(rows: Path, out: Path, uri: str, *more: str) -> list[str]:
    usual = ["--pool", POOL, "--registry", uri, "source.columns.question=q", "evaluation.cpus_per_worker=1"]
    return ["predict", str(rows), str(out), *usual, "evaluation.max_new_tokens=4", *more]


def pointsman(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def answers(out: Path) -> list[dict[str, Any]]:
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("part-*.parquet"))]).to_pylist()


@pytest.mark.ray
def test_a_registered_pool_answers_as_the_served_one(uri: str, rows: Path, tmp_path: Path) -> None:
    outcome = pointsman(*words(rows, tmp_path / "out", uri))
    assert outcome.exit_code == 0, outcome.output
    assert "4 rows in, 4 answered, 0 set aside" in outcome.output
    assert "models:/untrained.pool.demo/1, digest p" in outcome.output
    found = answers(tmp_path / "out")
    served = mlflow.pyfunc.load_model(POOL).predict(pd.DataFrame({"prompt": QUESTIONS}), {"max_new_tokens": 4})
    assert [row["answer"] for row in found] == served["answer"].tolist()
    assert [row["expert"] for row in found] == served["expert"].tolist()
    assert [row["id"] for row in found] == [f"rows [1].jsonl#{number}" for number in (1, 2, 3, 4)]


@pytest.mark.ray
def test_a_killed_command_goes_on(uri: str, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(f'{{"q": "repeat : {number % 7}"}}\n' for number in range(4000)))
    out, code = tmp_path / "out", "from jobs.cli import app; app()"
    command = [sys.executable, "-c", code, *words(file, out, uri, "rows_per_part=64", "evaluation.max_new_tokens=16")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while len(list(out.glob("part-*.parquet"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {part: part.stat().st_mtime_ns for part in out.glob("part-*.parquet")}
    assert not (out / "summary.json").exists()
    outcome = pointsman(*words(file, out, uri, "rows_per_part=64", "evaluation.max_new_tokens=16"))
    assert outcome.exit_code == 0, outcome.output
    assert "4,000 rows in, 4,000 answered" in outcome.output
    assert [row["number"] for row in answers(out)] == list(range(1, 4001))
    assert all(part.stat().st_mtime_ns == when for part, when in kept.items())


def test_mistakes_are_one_line_and_exit_code_2(uri: str, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mistakes = {
        "no '7' in 'untrained.pool.demo'": words(rows, out, uri, "--pool", "models:/untrained.pool.demo/7"),
        "nowhere.db does not exist": words(rows, out, f"sqlite:///{tmp_path}/nowhere.db"),
        "no pool.json, so not a pool folder": words(rows, out, uri, "--pool", str(tmp_path)),
        "base.path: the registry says which base answers": words(rows, out, uri, "base.path=tiny"),
        "prompt: the template must contain {question}": words(rows, out, uri, "prompt=what"),
        "no such field; did you mean `evaluation.workers`": words(rows, out, uri, "evaluation.worker=2"),
        "data.vision_cache: no such field": words(rows, out, uri, "data.vision_cache=features"),
        "which every user of the cluster could read": words(
            rows, out, "http://user:secret@mlflow:5000", "--address", "http://127.0.0.1:1"
        ),
    }
    for text, command in mistakes.items():
        outcome = pointsman(*command)
        assert outcome.exit_code == 2, outcome.output
        assert text in outcome.output
        assert "Traceback" not in outcome.output
        assert "secret" not in outcome.output
    assert not out.exists()
