"""Plans: what fits, what to change, how long it takes, what it weighs; and that the shipped configurations fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import BaseModelConfig, LearnConfig, load_config
from pipeline.planning.advice import advice, changed, largest_micro_batch
from pipeline.planning.architecture import Architecture, architecture_of, base_configuration
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.job import job_fits, job_moments, served_pool, worst_inference, worst_moment
from pipeline.planning.plan import Plan
from pipeline.planning.summary import make_plan, smallest_gpu
from pipeline.routing import Pool
from tests.helpers import make_expert

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
SHIPPED = {
    "internvl2_2b": ("internvl2_2b", "a10g"),
    "internvl2_8b": ("internvl2_8b", "a100-80"),
    "internvl2_8b_24gb": ("internvl2_8b", "a10g"),
}
"""Base and GPU of each GPU configuration."""
PLAIN = ["data.vision_cache=off", "training.gradient_checkpointing=false", "training.micro_batch=null",
         "training.zero_stage=1"]  # fmt: skip


def architecture(name: str) -> Architecture:
    return architecture_of(base_configuration(BaseModelConfig(path=str(CONFIGS / "bases" / name))))


@pytest.fixture(scope="module")
def bases() -> dict[str, Architecture]:
    return {name: architecture(name) for name in ("internvl2_2b", "internvl2_8b")}


def shipped(bases: dict[str, Architecture], name: str, *overrides: str, **options: Any) -> Plan:
    base, gpu = SHIPPED[name]
    return make_plan(
        load_config(CONFIGS / f"{name}.yaml", overrides, LearnConfig), bases[base], **{"gpu": gpu, **options}
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_fit_their_gpu_as_they_say(bases: dict[str, Architecture], name: str) -> None:
    plan = shipped(bases, name)
    assert plan.fits
    assert job_fits(plan)
    assert served_pool(plan).bytes <= plan.capacity
    assert advice(plan) == []
    text = " ".join((CONFIGS / f"{name}.yaml").read_text().replace("#", " ").split())
    stated = re.search(r"4,096 tokens, ([\d.]+) of (\d+) GB \(a row of 6 tiles: ([\d.]+) GB\), ([\d.]+) s a step", text)
    assert stated is not None
    longest, typical = (plan.peak(row)[1] / 1e9 for row in (plan.longest, plan.typical))
    assert [float(figure) for figure in stated.groups()] == pytest.approx(
        [longest, plan.capacity / 1e9, typical, plan.step_seconds], rel=0.02
    )
    command = re.search(r"pointsman plan (\S+) --gpu (\S+) --base-config (\S+)", text)
    assert command is not None
    assert command.groups() == (
        f"jobs/configs/{name}.yaml", SHIPPED[name][1], f"jobs/configs/bases/{SHIPPED[name][0]}/config.json"
    )  # fmt: skip


def test_the_smallest_gpu_that_holds_the_job_is_meant_where_none_is_named(bases: dict[str, Architecture]) -> None:
    for name, overrides, expected in (
        ("internvl2_2b", [], "a10g"),
        ("internvl2_8b", [], "a100-80"),
        ("internvl2_8b", ["training.zero_stage=0", "training.micro_batch=32", "data.max_tokens=32768"], "h200"),
        ("internvl2_2b", ["training.gpu=false"], None),
    ):
        config = load_config(CONFIGS / f"{name}.yaml", overrides, LearnConfig)
        assert smallest_gpu(config, bases[SHIPPED[name][0]], Assumptions()) == expected


def test_one_gpu_takes_the_same_steps(bases: dict[str, Architecture]) -> None:
    four, one = shipped(bases, "internvl2_2b"), shipped(bases, "internvl2_2b", "training.workers=1")
    assert one.fits
    assert one.rows_per_step == four.rows_per_step == 16
    assert one.step_seconds == pytest.approx(4 * (four.step_seconds or 0))


@pytest.mark.parametrize("name", SHIPPED)
def test_figures_hold_without_what_was_chosen(bases: dict[str, Architecture], name: str) -> None:
    """Every setting that was chosen is needed, or pays: comments in the configurations say which."""
    plan = shipped(bases, name, *PLAIN)
    assert not plan.fits
    changes = advice(plan)
    assert changes[-1].fits
    order = ["data.vision_cache", "training.micro_batch", "training.gradient_checkpointing", "training.zero_stage"]
    fields = [field for change in changes for field in change.settings]
    assert fields == [field for field in order if field in fields]
    peaks = [plan.peak(plan.longest)[1], *(change.bytes for change in changes)]
    assert peaks == sorted(peaks, reverse=True)


def test_advice_comes_in_order_and_stops_when_it_fits(bases: dict[str, Architecture]) -> None:
    plan = replace(shipped(bases, "internvl2_8b_24gb", *PLAIN, "base.attention=eager"), capacity=16e9)
    assert [str(change) for change in advice(plan)] == [
        "base.attention=sdpa",
        "data.vision_cache=features",
        "training.micro_batch=1",
        "training.gradient_checkpointing=true",
        "training.zero_stage=3",
        "evaluation.gpus_per_worker=2 evaluation.workers=4",
    ]
    assert [change.fits for change in advice(plan)] == [False] * 4 + [True] * 2
    alone = replace(shipped(bases, "internvl2_8b_24gb", *PLAIN, "training.workers=1"), capacity=16e9)
    assert str(advice(alone)[-2]) == "training.zero_stage=3 training.offload=all"
    nothing = replace(plan, capacity=1e9)
    assert not advice(nothing)[-1].fits
    assert largest_micro_batch(nothing) is None


def test_the_largest_micro_batch_divides_the_share(bases: dict[str, Architecture]) -> None:
    plan = shipped(bases, "internvl2_2b", "expert.batch_size=24")  # six rows a worker
    most = largest_micro_batch(plan)
    assert most in (1, 2, 3, 6)
    assert changed(plan, {"training.micro_batch": most}).fits
    roomy = replace(plan, capacity=1e12)
    assert largest_micro_batch(roomy) == 6


def test_longer_rows_and_larger_batches_need_more(bases: dict[str, Architecture]) -> None:
    def peak(*overrides: str) -> int:
        plan = shipped(bases, "internvl2_2b", *overrides)
        return plan.peak(plan.longest)[1]

    usual = peak()
    for more in ("training.micro_batch=2", "base.attention=eager", "data.vision_cache=off", "data.max_tokens=8192",
                 "expert.rank=64"):  # fmt: skip
        assert peak(more) > usual, more
    for less in ("training.gradient_checkpointing=true", "data.max_tokens=2048", "expert.dropout=0"):
        assert peak(less) < usual, less


def test_rows_and_batches_are_those_of_the_worker(bases: dict[str, Architecture]) -> None:
    plan = shipped(bases, "internvl2_2b", "expert.batch_size=18", "training.micro_batch=3")
    assert (plan.share, plan.micro_batch, plan.accumulated, plan.rows_per_step) == (5, 3, 2, 18)
    assert plan.kernel == "masked"
    assert changed(plan, {"training.micro_batch": 1}).kernel == "flash"
    assert changed(plan, {"base.attention": "flash_attention_2"}).kernel == "flash"


def test_tiles_and_text_make_the_typical_row(bases: dict[str, Architecture]) -> None:
    plan = shipped(bases, "internvl2_2b", assumptions=Assumptions(tiles=2, text_tokens=88, answer_tokens=40))
    assert (plan.typical.tokens, plan.typical.tiles) == (600, 2)
    assert (plan.longest.tokens, plan.longest.tiles) == (4096, 13)
    assert (plan.typical.answer_tokens, plan.longest.answer_tokens) == (40, 512)
    assert shipped(bases, "internvl2_2b", assumptions=Assumptions(answer_tokens=600)).longest.answer_tokens == 600
    assert shipped(bases, "internvl2_2b", "base.max_tiles=6").longest.tiles == 7
    assert shipped(bases, "internvl2_2b", "data.max_tokens=1024").longest.tiles == 4


def test_logits_are_those_of_the_answers(bases: dict[str, Architecture]) -> None:
    one, two, all_of_them = (
        shipped(bases, "internvl2_2b", f"training.micro_batch={rows}", "expert.batch_size=64") for rows in (1, 2, 16)
    )
    positions = [plan.step(plan.longest).learned for plan in (one, two, all_of_them)]
    assert positions == [512, 2 * 512, 16 * 512]
    assert two.moments(two.longest)["logits and loss"]["logits and loss"] == 12 * positions[1] * 92_553
    assert two.operations.total == all_of_them.operations.total


def test_zero_three_waits_for_a_slow_link(bases: dict[str, Architecture]) -> None:
    sharded = "training.zero_stage=3"
    fast, slow = (shipped(bases, "internvl2_8b_24gb", sharded, link=link) for link in (None, 3.0))
    assert 0 < fast.gathering_seconds < (fast.step_seconds or 0)
    assert slow.step_seconds == slow.gathering_seconds > (fast.step_seconds or 0)
    assert shipped(bases, "internvl2_2b", link=3.0).gathering_seconds == 0


def test_buffers_are_there_when_gradients_travel(bases: dict[str, Architecture]) -> None:
    for stage, size in ((1, 0), (3, 10**8)):
        plan = shipped(bases, "internvl2_8b_24gb", f"training.zero_stage={stage}")
        moments = plan.moments(plan.longest)
        assert moments["logits and loss"]["buffers between workers"] == size
        assert moments["last layer backward"]["buffers between workers"] == 10**8


def test_hours_add_up(bases: dict[str, Architecture]) -> None:
    plan = shipped(bases, "internvl2_2b")
    assert plan.step_seconds is not None
    assert plan.expert_seconds is not None
    assert plan.router_seconds is not None
    assert plan.evaluation_seconds is not None
    operations = plan.rows_per_step * plan.operations.total
    assert plan.step_seconds == pytest.approx(operations / (4 * 70e12 * 0.35))
    assert (plan.expert_seconds, plan.router_seconds) == (2000 * plan.step_seconds, 200 * plan.step_seconds)
    tasks = 2 * 4 * (plan.expert_seconds + plan.router_seconds)
    assert plan.gpu_seconds == pytest.approx(tasks + plan.evaluation_seconds)
    assert plan.clock_seconds == tasks / 4  # of two tasks, each on four GPUs
    both = shipped(bases, "internvl2_2b", "training.parallel_tasks=8")
    assert (both.parallel_tasks, both.clock_seconds, both.gpu_seconds) == (2, tasks / 8, plan.gpu_seconds)
    assert shipped(bases, "internvl2_2b", "training.parallel_tasks=auto").clock_seconds == plan.clock_seconds
    assert plan.evaluated_tasks == 4 + 2  # the base answers all, each expert its task
    choosing = {"router": plan.config.router.model_copy(update={"kind": "token"})}
    plan = replace(plan, config=plan.config.model_copy(update=choosing))
    assert plan.evaluated_tasks == 4 + 3 + 4  # each pool answers anew
    rarely = {"evaluation": plan.config.evaluation.model_copy(update={"every": 2})}
    assert replace(plan, config=plan.config.model_copy(update=rarely)).evaluated_tasks == 4 + 4


def test_a_cpu_has_no_hours_and_no_allowance(bases: dict[str, Architecture]) -> None:
    config = load_config(CONFIGS / "demo.yaml", [], LearnConfig)
    plan = make_plan(config, architecture_of(base_configuration(config.base)))
    assert plan.gpu is None
    assert plan.gpu_seconds is plan.step_seconds is None
    assert plan.fits
    assert not any("allowance" in part for parts in plan.moments(plan.longest).values() for part in parts)
    assert plan.longest.tokens == 512  # the positions that the tiny base knows


def test_sizes_are_those_on_disk(tiny_base: Any, known_pool: Pool, tmp_path: Path) -> None:
    config = load_config(CONFIGS / "demo.yaml", ["expert.rank=4", "router.feature_width=null"], LearnConfig)
    plan = make_plan(config, architecture_of(tiny_base.model.config))
    expert = replace(
        make_expert(tiny_base, "mine", rank=4),
        layer_statistics=next(iter(known_pool.experts.values())).layer_statistics,
    )
    folder = expert.save(tmp_path / "mine")
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert plan.sizes.expert == pytest.approx(on_disk, rel=0.1)
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert weights == pytest.approx(plan.sizes.adapter, abs=10_000)  # names of tensors
    assert plan.sizes.pool(10) == 10 * plan.sizes.expert + plan.sizes.null
    assert plan.sizes.null > plan.sizes.statistics  # several components


def test_every_moment_of_a_job_is_planned(bases: dict[str, Architecture]) -> None:
    plan = shipped(bases, "internvl2_2b")
    names = [moment.name for moment in job_moments(plan)]
    assert names == ["base prompts", "image features", "expert stage", "router stage", "evaluation"]
    assert worst_moment(plan).bytes == max(moment.bytes for moment in job_moments(plan))
    plain = shipped(bases, "internvl2_2b", "data.vision_cache=off", "stream.base_prompts=null")
    assert [m.name for m in job_moments(plain)] == ["expert stage", "router stage", "evaluation"]


def test_memory_for_experts_is_counted_instead_of_all_of_them(bases: dict[str, Architecture]) -> None:
    def experts(*settings: str) -> int:
        return served_pool(shipped(bases, "internvl2_2b", *settings)).parts["experts"]

    assert experts("evaluation.expert_memory=8MiB", "expert.rank=2") == 8 * 2**20
    assert experts("evaluation.expert_memory=1TiB") == experts()
    assert 1024 < experts("evaluation.expert_memory=1KiB") < experts(), "one at least"
    token = "router.kind=token"
    assert experts(token, "evaluation.expert_memory=1KiB") == experts(token)


def test_inference_needs_what_its_batches_need(bases: dict[str, Architecture]) -> None:
    """A fixed number of long prompts, with logits at all their tokens, would not fit where training does."""
    plan = shipped(bases, "internvl2_8b_24gb")
    moments = {moment.name: moment for moment in job_moments(plan)}
    decoder = plan.architecture.decoder
    cache = 2 * 2 * decoder.layers * decoder.key_value_heads * decoder.head_width
    assert moments["evaluation"].parts["KV cache"] == cache * 8192  # while the last layer reads prompts
    assert 2 * 64 * plan.longest.tokens * decoder.vocabulary > plan.capacity  # 64 prompts, logits at every token
    large = shipped(bases, "internvl2_8b_24gb", "evaluation.tokens_per_batch=65536", "evaluation.batch_size=64")
    assert large.fits
    assert not job_fits(large)
    (change,) = advice(large)
    assert str(change) == "evaluation.tokens_per_batch=16384"
    assert change.fits


def test_a_base_larger_than_a_gpu_says_how_many_its_evaluation_takes(bases: dict[str, Architecture]) -> None:
    plan = replace(shipped(bases, "internvl2_8b_24gb"), capacity=16e9)
    assert worst_inference(plan).bytes > plan.capacity
    settings = advice(plan)[-1].settings
    assert settings["evaluation.gpus_per_worker"] == 2
    assert settings["evaluation.workers"] == 4  # of the same eight GPUs
    spread = changed(plan, settings)
    assert worst_inference(spread).bytes <= plan.capacity
    weights = [m.parts["frozen weights"] for m in job_moments(spread) if m.name == "evaluation"]
    assert weights[0] < 0.6 * plan.states.weights
