"""`pointsman registry export`, over a registry with one pool of two experts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
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


@pytest.fixture(scope="module")
def uri(
    created: Created,
    make_expert: MakeExpert,
    make_pool: Callable[..., Pool],
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("registry")
    experiment = new_experiment(created, folder / "store")
    experts = [make_expert("digits", "e1"), make_expert("clock", "e2")]
    with tracked_run(experiment, "demo", "run"):
        versions = {e.card.name: register_expert("untrained", e.save(folder / e.card.name)) for e in experts}
        base = BaseModelConfig(path=str(tiny_folder))
        register_pool(make_pool(*experts), base, name="demo", digest="p1", experts=versions)
    yield mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("")


def export(uri: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["registry", "export", *words, "--registry", uri])


def test_the_command_says_what_it_wrote(uri: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("untrained.pool.demo", "--format", "vllm", "--out", str(out))
    printed = export(uri, *words).output
    assert "digits (1/2)" in printed
    assert f"{out} is written: untrained.pool.demo/1, 2 experts, base untrained" in printed
    assert "is complete already" in export(uri, *words).output
    assert json.loads(export(uri, *words, "--json").output) == {
        "folder": str(out), "format": "vllm", "source": "untrained.pool.demo/1", "base_name": "untrained",
        "experts": {"digits": "digits-v1", "clock": "clock-v1"}, "already_complete": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("untrained.pool.demo", "--expert", "later"), "no expert 'later' in the pool; there are: digits, clock"),
        (("untrained.expert.digits", "--expert", "digits"), "untrained.expert.digits is one expert already"),
        (("untrained.base",), "untrained.base/1 is neither a pool nor an expert"),
        (("untrained.pool.other",), "no model 'untrained.pool.other' in the registry"),
        (("untrained.pool.demo/7",), "no '7' in 'untrained.pool.demo'"),
    ],
)
def test_mistakes_end_with_one_line(uri: str, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    outcome = export(uri, *words, "--format", "peft", "--out", str(tmp_path / "out"))
    assert (outcome.exit_code, message in outcome.output) == (2, True), outcome.output
    assert not (tmp_path / "out").exists()
