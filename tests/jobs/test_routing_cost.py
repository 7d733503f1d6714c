"""The routing benchmark at tiny widths: every method computes what it should, and every cell lands in the summary."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from typer.testing import CliRunner

from jobs.benchmark.app import app
from jobs.benchmark.routing_cost import Measuring, peak_bytes
from jobs.benchmark.tools.methods import CANDIDATES, METHODS, PROMPT, RANK, TOP_K, Method, Routed, Workload, build
from jobs.benchmark.tools.methods import _lora_layers as lora_layers
from jobs.benchmark.tools.methods import _with_adapters as with_adapters
from pipeline.routing.routes import LayerRoute

LINEAR = "24x40"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The command sets the threads of the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["tiny", LINEAR])
def workload(request: pytest.FixtureRequest) -> Workload:
    with torch.inference_mode():
        return Workload(request.param, dtype=torch.float32, seed=0)


def routing(output: Path, *options: str) -> Any:
    options = ("routing", "--seconds", "0.02", "--threads", "1", "--output", str(output), *options)
    return CliRunner().invoke(app, options)


def results(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "summary.json").read_text())["results"]


@torch.inference_mode()
def outputs(method: Method, tokens: int) -> Any:
    step = method.step(tokens)
    first = step.run()
    step.reset()
    torch.testing.assert_close(step.run(), first, rtol=0, atol=0)  # a pass leaves no traces
    return first


def test_every_method_lands_in_the_summary(tmp_path: Path) -> None:
    outcome = routing(tmp_path, "--sizes", f"tiny,{LINEAR}", "--experts", "1,3")
    assert outcome.exit_code == 0, outcome.output
    cells = {(r["size"], r["method"], r["experts"], r["tokens"]): r for r in results(tmp_path)}
    several = [name for name in METHODS if name != "single"]
    assert cells.keys() == {
        (size, name, experts, tokens)
        for size in ("tiny", LINEAR)
        for name, experts in [("single", 1), *((name, experts) for name in several for experts in (1, 3))]
        for tokens in (PROMPT, 1)
        if size == "tiny" or name != "xlora"
    }
    for (size, name, _, _), r in cells.items():
        assert r["seconds_median"] > 0
        assert r["extra_bytes"] > 0
        assert r["rank"] == RANK
        assert r["ratio_to_single"] == r["seconds_median"] / r["single_seconds_median"]
        assert ("decision_seconds" in r) == (
            size == "tiny" and name in ("token_phatgoose", "token", "prompt", "two_level")
        )
        assert (r["width_in"], r["width_out"]) == ((128, 128) if size == "tiny" else (24, 40))
    assert "no KV cache" in cells["tiny", "xlora", 3, 1]["note"]
    assert (tmp_path / "routing.png").stat().st_size > 0
    assert "two_level" in outcome.output


@pytest.mark.parametrize("name", ["token_phatgoose", "prompt", "arrow", "mixed"])
def test_one_expert_answers_as_peft_with_one_lora(workload: Workload, name: str) -> None:
    with torch.inference_mode():
        one, method = build("single", workload, 1), build(name, workload, 1)
    for tokens in (PROMPT, 1):
        torch.testing.assert_close(outputs(method, tokens), outputs(one, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 3, 20])
def test_two_level_mixes_and_prompt_chooses_the_first(workload: Workload, experts: int) -> None:
    with torch.inference_mode():
        mixing, choosing, one = (build(name, workload, experts) for name in ("two_level", "prompt", "single"))
    outputs(mixing, PROMPT)
    assert isinstance(mixing, Routed)
    assert isinstance(mixing.state.route, LayerRoute)
    assert mixing.state.route.experts_BM.shape == (1, min(CANDIDATES, experts + 1))
    torch.testing.assert_close(outputs(choosing, 1), outputs(one, 1), rtol=1e-5, atol=1e-5)


def test_grown_adapters_answer_as_loaded_ones(workload: Workload, tmp_path: Path) -> None:
    names = ["first", "second", "third"]
    with torch.inference_mode():
        with_adapters(workload, names).save_pretrained(str(tmp_path))
        settings = ArrowConfig(top_k=TOP_K, rng_seed=workload.seed)
        loaded = create_arrow_model(workload.copy(), [str(tmp_path / name) for name in names], settings)
        grown = build("arrow", workload, len(names))
    for tokens in (PROMPT, 1):
        torch.testing.assert_close(outputs(grown, tokens), outputs(Method(workload, loaded), tokens))


def test_xlora_weighs_all_experts_and_one_as_peft_with_one_lora() -> None:
    with torch.inference_mode():
        workload = Workload("tiny", dtype=torch.float32, seed=0)
        one, alone, method = build("single", workload, 1), build("xlora", workload, 1), build("xlora", workload, 3)
    for tokens in (PROMPT, 1):
        torch.testing.assert_close(outputs(alone, tokens), outputs(one, tokens), rtol=1e-5, atol=1e-5)
    outputs(method, 1)
    scalings = method.module.base_model.internal_xlora_scalings
    assert scalings.shape == (1, PROMPT + 1, len(workload.linears), 3)
    assert all(layer.active_adapters == ["0", "1", "2"] for layer, _ in lora_layers(method.module, workload))


def test_what_does_not_fit_is_skipped_with_the_figure(tmp_path: Path) -> None:
    outcome = routing(tmp_path, "--sizes", LINEAR, "--experts", "1000", "--methods", "arrow", "--memory-gb", "0.1")
    assert outcome.exit_code == 0, outcome.output
    prefill, decoding = results(tmp_path)
    assert prefill["seconds_median"] is None
    assert "0.1" in prefill["skipped"]
    assert "GB" in prefill["skipped"]
    assert decoding["seconds_median"] > 0


def test_what_would_take_too_long_is_skipped_with_the_figure() -> None:
    measuring = Measuring(torch.float32, 0, seconds=0.02, memory_gb=1)
    measuring._seen[LINEAR, "mixed", PROMPT] += [(1, 1.0), (2, 2.0)]
    prefill, decoding = measuring.cell(LINEAR, 10, "mixed")
    assert "about 10 s" in prefill["skipped"]
    assert decoding["seconds_median"] > 0


def test_an_interrupted_run_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Measuring.cell

    def interrupted(self: Measuring, size: str, experts: int, name: str) -> list[dict[str, Any]]:
        if name == "token":
            raise KeyboardInterrupt
        return measure(self, size, experts, name)

    monkeypatch.setattr(Measuring, "cell", interrupted)
    assert routing(tmp_path, "--sizes", LINEAR, "--experts", "2", "--methods", "mixed,token").exit_code != 0
    assert [r["method"] for r in results(tmp_path)] == ["mixed", "mixed"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--methods", "single,foo"), ("'foo'", "two_level")),
        (("--sizes", "huge"), ("'huge'", "internvl2_2b")),
        (("--sizes", LINEAR, "--methods", "xlora"), ("xlora", "tiny")),
        (("--experts", "0"), ("numbers from 1",)),
        (("--dtype", "int8"), ("'int8'", "bfloat16")),
    ],
)
def test_mistakes_are_named_with_what_is_known(
    tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    outcome = routing(tmp_path, *options)
    assert outcome.exit_code == 2
    assert outcome.output.startswith("error: ")
    assert outcome.output.count("\n") == 1
    assert all(word in outcome.output for word in words)


def test_peak_bytes_counts_what_stands_at_once() -> None:
    x = torch.zeros(1 << 20)
    assert peak_bytes(lambda: (x + 1) * 2) == 2 * x.nbytes
    assert peak_bytes(lambda: x.view(2, -1).add_(1)) == 0
    assert peak_bytes(lambda: [x + 1 for _ in range(3)][:1]) == 3 * x.nbytes
