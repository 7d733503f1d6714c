"""The command as a user types it, and its plot."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.data.demo.abilities import ABILITIES
from pipeline.evaluation.plots import routing_of_a_prompt
from pipeline.models.bases import Base
from pipeline.routing import Decision, Pool
from pipeline.routing.insight import Explanation
from tests.helpers import CLAIMS, attached, generate, prompts

EXAMPLE = ABILITIES["describe"](np.random.default_rng(11))
"""What `painter` claims to answer."""


@pytest.fixture(scope="module")
def folder(known_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return known_pool.save(tmp_path_factory.mktemp("explain") / "pool")


@pytest.fixture(scope="module")
def image(folder: Path) -> Path:
    file = folder.parent / "picture.png"
    assert EXAMPLE.image is not None
    EXAMPLE.image.save(file)
    return file


@pytest.fixture
def run(tiny_folder: Path, folder: Path, tmp_path: Path) -> Any:
    """Runs the command; `options` may repeat or replace the usual ones."""

    def run(*options: str, prompt: str = EXAMPLE.question, base: Path | str = tiny_folder, pool: Path = folder) -> Any:
        usual = ["--pool", str(pool), "--prompt", prompt, "--base", str(base), "--max-new-tokens", "3"]
        return CliRunner().invoke(app, ["explain", *usual, "--plot", str(tmp_path / "new" / "why.png"), *options])

    return run


def lines(outcome: Any) -> dict[str, str]:
    """Returns the lines of the form `word   text` by word."""
    return dict(line.split(maxsplit=1) for line in outcome.output.splitlines() if len(line.split()) > 1)


@pytest.mark.parametrize("router", [(), ("--router", "token"), ("--router", "two_level")])
def test_it_says_who_answered_what_and_why(run: Any, image: Path, tmp_path: Path, router: tuple[str, ...]) -> None:
    outcome = run("--image", str(image), *router)
    assert outcome.exit_code == 0, outcome.output
    output = lines(outcome)
    assert output["expert"] == "painter"
    assert len(output["answer"].split()) <= 3
    assert output["because"].startswith("painter: ")
    assert "Candidate experts" in outcome.output
    for name in (*CLAIMS, "base"):
        assert any(name in line and "%" in line and "│" in line for line in outcome.output.splitlines())
    assert output["plot"] == str(tmp_path / "new" / "why.png")
    assert Image.open(tmp_path / "new" / "why.png").format == "PNG"


def test_the_answer_is_the_models(run: Any, tiny_base: Base, known_pool: Pool) -> None:
    """A question without an image."""
    (row,) = prompts(tiny_base.processor, "repeat", 1, seed=8)
    question = tiny_base.processor.tokenizer.decode(row.input_ids, skip_special_tokens=True)
    with attached(tiny_base, known_pool):
        tokens, _ = generate(tiny_base, [row], tokens=3)
    outcome = run(prompt=question)
    assert outcome.exit_code == 0, outcome.output
    output = lines(outcome)
    assert output["expert"] == "speaker"
    expected = tiny_base.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert expected.startswith(output["answer"])


def test_several_images_may_stand_within_the_prompt(run: Any, image: Path) -> None:
    outcome = run("--image", str(image), "--image", str(image), prompt="is <image> like <image> ?")
    assert outcome.exit_code == 0, outcome.output


def test_mistakes_are_one_line_and_exit_code_2(run: Any, image: Path, tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not an image")
    broken = tmp_path / "broken.png"
    broken.write_bytes(image.read_bytes()[:60])
    mistakes = {
        "missing.png: no such file": run("--image", str(tmp_path / "missing.png")),
        "notes.png: not an image that can be read": run("--image", str(text)),
        "broken.png: not an image that can be read": run("--image", str(broken)),
        f"{tmp_path}: not an image that can be read": run("--image", str(tmp_path)),
        "--prompt holds 2 x <image>, --image was given 1 times": run("--image", str(image), prompt="<image> <image> ?"),
        "--prompt holds 1 x <image>, --image was given 0 times": run(prompt="<image> ?"),
        "--router 'best': choose token, prompt or two_level": run("--router", "best"),
        "no pool.json, so not a pool folder": run(pool=tmp_path / "nowhere"),
        "with fingerprint": run(base="tiny"),
        "does not exist; give a checkpoint folder": run(base=tmp_path / "no_base"),
    }
    for words, outcome in mistakes.items():
        assert outcome.exit_code == 2, outcome.output
        assert outcome.output.startswith("error: ")
        assert outcome.output.count("\n") == 1, outcome.output
        assert words in outcome.output
    assert not (tmp_path / "new").exists()


def test_an_empty_pool_has_nothing_to_explain(run: Any, known_pool: Pool, tmp_path: Path) -> None:
    empty = known_pool
    for name in CLAIMS:
        empty = empty.remove(name)
    outcome = run(pool=empty.save(tmp_path / "empty"))
    assert outcome.exit_code == 2
    assert outcome.output.startswith("error: the pool is empty")


PATHS = [f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.up_proj", "attn.q_proj")]


def explanation(decided: dict[str, float], weights_TE: torch.Tensor) -> Explanation:
    """Returns an explanation of four experts in which all Linears weigh alike."""
    best = max(decided, key=decided.__getitem__, default=None)
    return Explanation(Decision(best, decided), (), dict.fromkeys(PATHS, weights_TE), tuple("abcdef"))


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_images()]


def test_the_plot_has_a_panel_for_everybody_who_took_part() -> None:
    weights_TE = torch.rand(3, 6)
    figure = routing_of_a_prompt(explanation({"b": 0.3, "a": 0.005, "e": 0.6}, weights_TE), ["x", "y", "z"])
    assert [axes.get_title(loc="left") for axes in panels(figure)] == ["e", "b"]
    for axes, column in zip(panels(figure), (4, 1), strict=True):
        (drawn,) = axes.get_images()
        torch.testing.assert_close(torch.tensor(drawn.get_array()).float(), weights_TE[:, column].expand(4, 3))
        assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "0 up_proj",
            "0 q_proj",
            "1 up_proj",
            "1 q_proj",
        ]
        assert drawn.get_clim() == (0, 1)


def test_the_plot_shows_four_at_most() -> None:
    decided = {name: 0.1 + i / 100 for i, name in enumerate("abcdef")}
    figure = routing_of_a_prompt(explanation(decided, torch.rand(2, 6)), ["x", "y"])
    assert [axes.get_title(loc="left") for axes in panels(figure)] == ["f", "e", "d", "c"]


def test_the_base_alone_has_an_empty_panel() -> None:
    for decided in ({}, {"a": 0.001}):
        (axes,) = panels(routing_of_a_prompt(explanation(decided, torch.zeros(2, 6)), ["x", "y"]))
        assert axes.get_title(loc="left") == "the base alone"
        assert not axes.get_images()[0].get_array().any()


def test_equal_neighbours_share_a_column() -> None:
    weights_TE = torch.tensor([0.1, 0.2, 0.6, 0.4, 0.5, 0.9])[:, None].expand(-1, 6)
    tokens = ["<img>", "pixel", "pixel", "pixel", " ", "pixel"]
    (axes,) = panels(routing_of_a_prompt(explanation({"a": 1.0}, weights_TE), tokens))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<img>", "pixel ×3", "␣", "pixel"]
    assert axes.get_images()[0].get_array()[0].tolist() == pytest.approx([0.1, 0.4, 0.5, 0.9])


def test_tokens_are_drawn_as_they_stand() -> None:
    """Dollar signs are no formulas."""
    figure = routing_of_a_prompt(explanation({"a": 1.0}, torch.rand(3, 6)), ["$$", r"$\frac$", "$x^$"])
    figure.savefig(io.BytesIO(), format="png")
    assert [label.get_text() for label in panels(figure)[0].get_xticklabels()] == ["$$", r"$\frac$", "$x^$"]
