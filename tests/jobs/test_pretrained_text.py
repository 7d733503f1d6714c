"""The rows of the benchmark on pretrained weights, and its perplexity; the weights themselves are not here."""

import json
import math

import pytest
import torch

from jobs.benchmark.pretrained_text import SMOLLM2, perplexity
from jobs.benchmark.tools.library_text import MODULES, descriptions, paragraphs, write_library
from pipeline.config import LearnConfig, load_config
from pipeline.data.errors import StreamError
from pipeline.models.encoding import collate_for
from tests.helpers import ask, attached

TEXT = "Return something that is long enough to describe a function well"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    counts = write_library(folder)
    return counts, {name: (folder / f"{name}.jsonl").read_text() for name in counts}


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_enough_rows_of_every_module(library):
    counts, texts = library
    assert counts["modules-train"] > 500
    for part in ("train", "eval"):
        answers = {row["messages"][1]["content"] for row in rows(texts[f"modules-{part}"])}
        assert answers == set(MODULES.values())


def test_nothing_is_both_learned_and_asked(library):
    _, texts = library
    names = {part: {row["id"].partition("-")[2] for row in rows(texts[part])} for part in texts}
    assert not names["modules-train"] & names["modules-eval"]
    assert not names["general"] & names["documentation"]
    output = {part: {row["messages"][0]["content"] for row in rows(texts[part])} for part in texts}
    parts = list(output)
    assert not any(output[a] & output[b] for i, a in enumerate(parts) for b in parts[i + 1 :])


def test_the_same_rows_every_time(library, tmp_path):
    counts, texts = library
    assert write_library(tmp_path) == counts
    assert {name: (tmp_path / f"{name}.jsonl").read_text() for name in counts} == texts


def test_descriptions_are_first_paragraphs_and_come_once(tmp_path):
    (tmp_path / "first.py").write_text(f'def f():\n    """{TEXT}.\n\n    More.\n    """\ndef g():\n    """Short."""\n')
    (tmp_path / "second.py").write_text(
        f'class C:\n    """{TEXT}."""\n    def h(self):\n        """{TEXT},\n    too."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "third.py").write_text(f'def f():\n    """{TEXT}!"""\n')
    actual = [(d.module, d.name, d.text) for d in descriptions(tmp_path)]
    assert actual == [("first", "f", f"{TEXT}."), ("second", "h", f"{TEXT}, too.")]


def test_prose_is_not_a_description():
    assert len(list(paragraphs())) > 60


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.benchmark.tools.library_text.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(StreamError, match="without the sources of its library"):
        write_library(tmp_path / "rows")


def test_the_stream_names_the_files_that_are_written(library):
    config = load_config(SMOLLM2, [], LearnConfig)
    sources = [t.eval.path for t in (*config.stream.tasks, *config.stream.benchmarks)] + [
        config.stream.base_prompts.path
    ]
    written = {path.rpartition("/")[2].removesuffix(".jsonl") for path in sources if not path.startswith("demo")}
    assert written | {"modules-train"} == set(library[0])


def test_perplexity_is_that_of_one_pass(tiny_base, known_pool):
    row = ask(tiny_base.processor, "repeat : red blue", answer="red blue")
    with torch.no_grad():
        loss = tiny_base.model(**collate_for(tiny_base.processor, [row])).loss.item()
    with attached(tiny_base, known_pool) as routed:
        with routed.forced(None):
            assert perplexity(routed, [row]) == (pytest.approx(math.exp(loss), rel=1e-4), 1)
        value, to_base = perplexity(routed, [row])
    assert value != pytest.approx(math.exp(loss), rel=1e-4)
    assert to_base == 0
