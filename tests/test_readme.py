"""What the READMEs say: the snippet runs as it stands, commands parse, links lead somewhere, the front page stays short."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.benchmark.app import app as benchmarks
from jobs.cli import JOBS
from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from tests.helpers import claimed_pool

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for room in ("pipeline", "tuning", "jobs", "cluster") for page in (ROOT / room).rglob("README.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for actual, text in BLOCK.findall(page.read_text()) if actual == kind]


def test_the_snippet_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed_pool(load_base(BaseModelConfig(path="tiny"))).save(tmp_path / "runs" / "demo" / "pool")
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(compile(snippet, "README.md", "exec"), {})
    answers, expert = capsys.readouterr().out.splitlines()[-2:]
    assert answers.startswith("[")
    assert expert


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there(page: Path) -> None:
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["pointsman"]:
            continue
        assert words[1] in JOBS, line
        if words[1] == "benchmark":
            assert CliRunner().invoke(benchmarks, [words[2], "--help"]).exit_code == 0, line
        for word in words[2:]:
            if word.endswith(".yaml") or word.startswith("jobs/"):
                assert (ROOT / word).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_front_page_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
