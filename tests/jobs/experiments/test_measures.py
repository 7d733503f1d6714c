"""What experiments read off a learned pool: which pools they ask, and what they make of the answers. Answers are made up."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.experiments import ablation, forgetting, pools, resemblance, robustness, scale, transfer
from jobs.experiments.settings import DEMO_TASKS
from pipeline.config import RouterConfig, digest
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.data.demo.confusable import mixed
from pipeline.evaluation.matrix import BASE, AccuracyMatrix
from pipeline.evaluation.results import Evaluation, TaskResult
from pipeline.routing import Pool
from pipeline.routing.null import components
from tests.helpers import make_expert

OWN, STRAY, ABILITY = 0.8, 0.25, 0.9
"""Accuracy of the right expert, share of prompts that a router sends elsewhere (where they are wrong), the base's accuracy."""


class Session:
    """Evaluates as `StreamSession` does, with made-up answers: a quarter of the prompts go astray where a router chooses."""

    def __init__(self, tmp_path, columns: Sequence[str]) -> None:
        self.folder, self.asked, self.names = tmp_path, [], dict[str, list[str]]()
        self.data = SimpleNamespace(eval_tasks=dict.fromkeys(columns))
        self.config = SimpleNamespace(stream=SimpleNamespace(benchmarks=[SimpleNamespace(name=n) for n in columns]))

    def pool_key(self, pool: Pool) -> str:
        key = digest(pool.names, pool.router)
        self.names[key] = pool.names
        return key

    def evaluate(self, names, pool, key, mode="routed", *, folder=None, samples=4, who="") -> Evaluation:
        self.asked.append((key, mode))
        assert pool is None or mode != "routed" or pool.router.kind == "prompt" or folder.is_dir()
        results = {}
        for name in names:
            owner = name if pool is not None and name in pool.names else BASE
            best = OWN if owner != BASE else ABILITY if name in BENCHMARKS else 0.0
            if mode == "single":
                accuracy, experts = (OWN / 2, {pool.names[0]: 4})
            elif mode == "oracle" or pool is None:
                accuracy, experts = best, {owner: 4}
            else:
                accuracy, experts = best * (1 - STRAY), {owner: 3, "another": 1}
            results[name] = TaskResult(accuracy, None, experts)
        return Evaluation(results)


@pytest.fixture(scope="module")
def pool_of(tiny_base):
    def make(names: Sequence[str]) -> Pool:
        experts = [make_expert(tiny_base, name, rank=1, seed=i) for i, name in enumerate(names)]
        null = components(experts[0].statistics.mean_F + experts[0].statistics.mean_F.new_zeros(20, 1), 1)
        return Pool("tiny", tiny_base.fingerprint, RouterConfig(), experts, null)

    return make


def learned_of(pool: Pool, **summary: Any) -> Any:
    return SimpleNamespace(pool=pool, pool_digest="digest", pool_folder=None, summary=summary)


def test_a_part_of_a_pool_keeps_order_and_null_expert_and_has_a_name_of_its_own(pool_of, tmp_path) -> None:
    pool, session = pool_of(["a", "b", "c"]), Session(tmp_path, ["a"])
    some, bare = pools.part(pool, ["c", "a"]), pools.part(pool, ["c", "a"], null=False)
    assert some.names == bare.names == ["a", "c"]
    assert (len(some.null), len(bare.null), pool.names) == (len(pool.null), 0, ["a", "b", "c"])
    keys = {pools.key_of(session, of) for of in (pool, some, bare)}
    assert len(keys) == 3


def test_scale_reads_smaller_pools_off_the_learned_one(pool_of, tmp_path) -> None:
    names = mixed(10)
    matrix = AccuracyMatrix(names, BENCHMARKS)
    matrix.record(BASE, dict.fromkeys(BENCHMARKS, ABILITY))
    tasks = {name: {"turn_seconds": float(i)} if i != 3 else {} for i, name in enumerate(names)}
    learned = learned_of(pool_of(names), accuracy_matrix=matrix.to_json(), tasks=tasks)
    result = scale.measure(Session(tmp_path, [*names, *BENCHMARKS]), learned)
    assert list(result) == ["5", "10"]
    assert result["5"]["own_to_oracle"] == pytest.approx(1 - STRAY)
    assert result["10"]["base_kept"] == pytest.approx(1 - STRAY)
    assert result["5"]["oracle"] == pytest.approx(OWN)
    assert result["10"]["routing"] == result["10"]["base_routing"] == result["10"]["kinds"]["order"] == 0.75
    assert (result["5"]["seconds_per_task"], result["10"]["seconds_per_task"]) == (1.5, 7.0)


def test_resemblance_asks_a_pool_per_level_and_router(pool_of, tmp_path) -> None:
    names = [name for kind in resemblance.LEVELS.values() for name in resemblance.of_level(kind)]
    session = Session(tmp_path, [*names, *BENCHMARKS])
    result = resemblance.measure(session, learned_of(pool_of(names)))
    assert set(result) == {*resemblance.LEVELS.values(), "reported", "all"}
    assert set(result["order"]) == set(resemblance.METHODS)
    assert result["order"]["prompt"]["own_to_oracle"] == pytest.approx(0.75)
    assert result["all"]["prompt"]["base_kept"] == pytest.approx(0.75)
    routed = [key for key, mode in session.asked if mode == "routed"]
    assert len(set(routed)) == len(routed) == 6 * 3 + 2 + 1, "each pool has a name of its own; and the base"


def test_robustness_puts_each_variant_into_a_pool_without_its_like(pool_of, tmp_path) -> None:
    seen = {}

    def configure(label, seed, stream, *own):
        seen[label] = stream

    robustness.runs(0, configure)
    names = [task["name"] for task in seen[robustness.LEARNED]["tasks"]]
    session = Session(tmp_path, [*names, *BENCHMARKS])
    result = robustness.measure_learned(session, learned_of(pool_of(names)))
    assert set(result) == {name for name in names if name.startswith(("renamed", "later"))}
    assert result["renamed_32"] == {
        "own": pytest.approx(OWN * 0.75), "oracle": OWN, "routing": 0.75,
        "others_kept": pytest.approx(0.75), "base_kept": pytest.approx(0.75),
    }  # fmt: skip
    pools_asked = [session.names[key] for key, mode in session.asked if mode == "routed" and key != BASE]
    assert all(sum(name.startswith("renamed") for name in of) == 1 for of in pools_asked)


def test_robustness_asks_under_each_circumstance(pool_of, tmp_path) -> None:
    seen = {}
    robustness.runs(0, lambda label, seed, stream, *own: seen.update({label: stream}))
    stream = seen[robustness.ASKED]
    columns = [each["name"] for each in (*stream["tasks"], *stream["benchmarks"])]
    result = robustness.measure_asked(Session(tmp_path, columns), learned_of(pool_of(DEMO_TASKS)))
    assert set(result) == {"plain", *robustness.CIRCUMSTANCES, robustness.STRANGERS}
    assert result["plain"]["routing"] == result[robustness.STRANGERS]["routing"] == 0.75
    assert result["shifted"]["routing"] == 0, "a made-up evaluation sends what is no task to the base"
    assert result["shifted"]["oracle"] == OWN / 2


def made_up_methods(new: float, **columns: float) -> dict:
    return {"new": new, "base_abilities": ABILITY, "samples": 1, "seconds": 1.0,
            "columns": dict.fromkeys([*DEMO_TASKS, *BENCHMARKS], new) | columns}  # fmt: skip


def test_transfer_reads_both_modalities(pool_of, tmp_path, monkeypatch) -> None:
    written, printed = ([f"{name}_{modality}" for name in transfer.OPERATIONS] for modality in ("text", "picture"))
    seen = dict.fromkeys(written, 0.7) | dict.fromkeys(printed, 0.2)
    methods = {name: made_up_methods(0.5, **seen) for name in ("base", "oracle", "prompt")}
    monkeypatch.setattr(transfer, "compare_methods", lambda *args, **more: methods)
    session = Session(tmp_path, [*BENCHMARKS, *printed])
    result = transfer.measure(session, learned_of(pool_of(written)))
    assert result["rotate"]["seen"] == {"base": 0.7, "oracle": 0.7, "prompt": 0.7}
    assert result["rotate"]["unseen"] == {"base": 0.2, "oracle": OWN / 2, "prompt": 0.2}, "the text's expert is given"
    assert result["base_abilities"]["prompt"] == pytest.approx(0.5), "without the operations in the other modality"


def test_forgetting_asks_for_what_depends_on_the_order_in_both(tmp_path, monkeypatch) -> None:
    asked = []

    def compare(session, learned, *, fine_tuned, routers, over_time):
        asked.append((fine_tuned, routers, over_time))
        names = ("base", "oracle", *fine_tuned, *routers)
        return {
            name: made_up_methods(0.5) | {"continual": {"forgetting": 0.1, "backward_transfer": -0.1}} for name in names
        }

    monkeypatch.setattr(forgetting, "compare_methods", compare)
    learned = learned_of(None, continual={"forgetting": 0.0, "backward_transfer": 0.0})
    forward, backward = forgetting._forward(None, learned), forgetting._backward(None, learned)
    assert {"multitask", "multitask_base", "token", "ewc"} <= set(forward)
    assert set(backward) == {"base", "oracle", "sequential", "replay", "ewc", "prompt"}
    assert (forward["ewc"]["forgetting"], forward["prompt"]["forgetting"]) == (0.1, 0.0)
    assert all(over_time for _, _, over_time in asked)


def test_ablation_measures_each_setting_of_a_learned_pool(pool_of, tmp_path) -> None:
    session = Session(tmp_path, [*DEMO_TASKS, *BENCHMARKS])
    result = ablation.measure_routers(session, learned_of(pool_of(DEMO_TASKS)))
    assert set(result) == set(ablation.ROUTED)
    assert result["prompt"] == {"new": pytest.approx(OWN * 0.75), "base_kept": pytest.approx(0.75)}
    tasks = dict.fromkeys(DEMO_TASKS, {"step_seconds": 2.0, "samples": 4})
    trained = ablation.measure_trained(session, learned_of(pool_of(DEMO_TASKS), tasks=tasks))
    assert (trained["oracle"], trained["seconds_per_step"]) == (pytest.approx(OWN), 0.5)


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_alone_tell_where_they_would_be_sent(shared, monkeypatch) -> None:
    """Clusters of made-up features: two tasks share one, so each gets half of what is theirs; all others are apart."""

    def features(name: str, part: str) -> torch.Tensor:
        cluster = "twins" if name in ("a_000", "a_001") else "base" if name in (*BENCHMARKS, "general") else name
        random = torch.Generator().manual_seed(sum(map(ord, name + part)))
        centre_F = 5 * torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, cluster))))
        return centre_F + torch.randn(400 if part == "train" else 100, 12, generator=random)

    monkeypatch.setattr(ablation, "_features", features)
    sent = ablation.sent_right(shared=shared, tasks=("a_000", "a_001", "b_000"), null_components=2)
    assert sent["base"] == 1.0
    assert sent["own"] == pytest.approx(2 / 3, abs=0.1)
