"""Descriptions are Markdown that a database keeps whole, however many tasks a pool has."""

from pipeline.registry.descriptions import LONGEST, Answered, Measured, Origin, expert_description, pool_description
from pipeline.registry.scores import Score
from tests.registry.conftest import MakeExpert

ORIGIN = Origin("pointsman learn jobs/configs/demo.yaml", "0123456789abcdef", "#/experiments/1/runs/abc")


def test_an_expert_says_what_it_is_and_shows_answers(make_expert: MakeExpert) -> None:
    text = expert_description(
        "tiny",
        make_expert("digits", "aaa").card,
        rows=1500,
        score=Score("digits", "d", 0.75, 0.28),
        samples=[Answered("digits", "which *digit* is\nthis ?", "7", "digits", False)],
        origin=Origin("pointsman learn x.yaml", "0123456789abcdef", "#/experiments/1/runs/abc", "demo://digits/train"),
    )
    assert "640 samples of 1,500 rows, with seed 0" in text
    assert "**0.750**; the base alone has 0.280" in text
    assert r"- which \*digit\* is this ? → **7** (digits; wrong)" in text
    assert "Learned from `demo://digits/train`. Made by `pointsman learn x.yaml`, commit 012345678." in text
    assert "[Its run](#/experiments/1/runs/abc)" in text


def test_a_pool_shows_accuracies_and_routing() -> None:
    scores = [Score("shape", "s", 0.98, 0.98, True), Score("digits", "d", 0.75, 0.28)]
    measured = Measured(scores, {"digits": 0.995, "shape": 1.0}, [Answered("digits", "which ?", "", "base", True)])
    text = pool_description(
        "tiny", "demo", {"digits": 3}, "prompt", measured=measured, verdict="champion", origin=ORIGIN
    )
    assert "Mean accuracy on its tasks **0.750**, base abilities kept **100.0%**." in text
    rows = [line.replace("&emsp;", "") for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| [digits](#/models/tiny.expert.digits/versions/3) | 0.280 | 0.750 | 99.5% |",
        "| shape | 0.980 | 0.980 | 100.0% |",
    ]
    assert "- which ? → **(nothing)** (base)" in text
    assert "**Promotion:** champion" in text


def test_a_pool_of_a_thousand_tasks_fits() -> None:
    names = [f"a_rather_long_name_of_a_task_{number}" for number in range(1000)]
    experts = dict.fromkeys(names, 1)
    measured = Measured(
        [Score(name, "d", 0.5, 0.1) for name in names],
        {},
        [Answered(n, "q" * 500, "a" * 500, n, True) for n in names[:18]],
    )
    for text in (
        pool_description("tiny", "demo", experts, "prompt", measured=measured, origin=ORIGIN),
        pool_description("tiny", "demo", experts, "prompt"),
    ):
        assert len(text) <= LONGEST
    assert "more, in the run's report" in pool_description(
        "tiny", "demo", experts, "prompt", measured=Measured(measured.scores), origin=ORIGIN
    )
