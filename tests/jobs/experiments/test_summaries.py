"""Summaries of experiments on made-up results, against the same figures computed another way; their tables and charts."""

import json
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from jobs.experiments import ablation, forgetting, resemblance, robustness, scale, transfer
from jobs.experiments.page import HOW, write_page
from jobs.experiments.settings import DEMO_TASKS
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.data.demo.confusable import KINDS

SEEDS = 3
HOW_IT_WAS_MADE = {
    "command": "pointsman experiment all",
    "seeds": list(range(SEEDS)),
    "runs": 6,
    "seconds": 60.0,
    "overrides": [],
    "started": "2026-01-01T00:00:00+00:00",
    "git_commit": None,
    "versions": {"torch": "2"},
}


def page_of(name: str, experiment, figures, folder: Path) -> str:
    """The page of figures as `summary.json` holds them."""
    plain = json.loads(json.dumps(figures | {HOW: HOW_IT_WAS_MADE}, allow_nan=False))
    return write_page(name, experiment, plain, folder).read_text()


def method(new: float, abilities: float, **more: float) -> dict:
    columns = dict.fromkeys(DEMO_TASKS, new) | dict.fromkeys(BENCHMARKS, abilities)
    return {"new": new, "base_abilities": abilities, "base_kept": abilities / 0.9, "samples": 10, "training_seconds": 2.0,
            "columns": columns, "backward_transfer": None, "forgetting": None, **more}  # fmt: skip


def test_forgetting_is_the_mean_over_seeds_of_the_mean_over_orders(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    forward, backward = random.random((2, SEEDS))
    multitask = random.random(SEEDS)

    def sequential(value: float) -> dict:
        return method(value, 0.1, backward_transfer=-value, forgetting=value / 2)

    both = {"base": method(0.0, 0.9), "prompt": method(0.8, 0.9), "seconds": 1.0}
    results = {
        forgetting.FORWARD: [
            both | {"sequential": sequential(f), "multitask": method(m, 0.3)}
            for f, m in zip(forward, multitask, strict=True)
        ],
        forgetting.BACKWARD: [both | {"sequential": sequential(b)} for b in backward],
    }
    figures = forgetting.summarise(results)
    halves = [(f + b) / 2 for f, b in zip(forward, backward, strict=True)]
    assert figures["sequential"]["new_mean"] == pytest.approx(fmean(halves))
    assert figures["sequential"]["new_std"] == pytest.approx(stdev(halves))
    assert figures["sequential"]["backward_transfer_mean"] == pytest.approx(-fmean(halves))
    assert figures["sequential"]["orders_apart_mean"] == pytest.approx(np.abs(forward - backward).mean())
    assert figures["multitask"]["new_mean"] == pytest.approx(multitask.mean()), "done in one order"
    assert figures["multitask"]["new_std"] == pytest.approx(np.std(multitask, ddof=1))
    assert "forgetting_mean" not in figures["multitask"]
    assert figures["prompt"]["base_kept_mean"] == pytest.approx(1.0)
    page = page_of("forgetting", forgetting.EXPERIMENT, figures, tmp_path)
    assert "forgetting.prompt.new_mean" in page


def test_scale_by_number_of_tasks(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    own = random.random((SEEDS, 2))
    results = {
        "scale": [
            {
                str(size): dict.fromkeys(scale.KEYS, float(own[seed, i]))
                | {"seconds_per_task": None if seed == 1 else 2.0, "kinds": {"domain": 1.0, "order": 0.5}}
                for i, size in enumerate((5, 100))
            }
            | {"seconds": 1.0}
            for seed in range(SEEDS)
        ]
    }
    figures = scale.summarise(results)
    assert list(figures) == ["5", "100"], "a stream that was cut short has fewer sizes"
    assert figures["100"]["own_to_oracle"] == figures["100"]["own_to_oracle_mean"] == pytest.approx(own[:, 1].mean())
    assert figures["100"]["base_kept_std"] == pytest.approx(np.std(own[:, 1], ddof=1))
    assert "seconds_per_task_mean" not in figures["5"], "tasks that were found took no time"
    assert figures["5"]["kinds"]["order"] == {"routing_mean": 0.5, "routing_std": 0.0}
    assert figures["5"]["kinds"]["pictures"] == {}
    assert "scale.100.base_kept" in page_of("scale", scale.EXPERIMENT, figures, tmp_path)


def test_resemblance_by_level_and_router(tmp_path: Path) -> None:
    part = dict.fromkeys(resemblance.KEYS, 0.75)
    levels = [*resemblance.LEVELS.values(), "reported", "all"]
    one = {kind: dict.fromkeys(resemblance.METHODS[: 2 if kind == "all" else 3], part) for kind in levels}
    figures = resemblance.summarise({"resemblance": [one | {"seconds": 1.0}] * SEEDS})
    assert figures["order"]["prompt"]["own_to_oracle_mean"] == 0.75
    assert "two_level" not in figures["all"]
    page = page_of("resemblance", resemblance.EXPERIMENT, figures, tmp_path)
    assert page.count("class=\"missed\"") == len(resemblance.EXPERIMENT.targets)  # fmt: skip


def test_transfer_is_held_against_experts_trained_on_the_other_modality(tmp_path: Path) -> None:
    methods = ("base", "oracle", "sequential", "multitask", "prompt")

    def result(unseen: float, trained: float) -> dict:
        accuracies = dict.fromkeys(methods, unseen) | {"base": 0.1}
        both = {"seen": dict.fromkeys(methods, trained), "unseen": accuracies}
        return dict.fromkeys(transfer.OPERATIONS, both) | {
            "base_abilities": dict.fromkeys(methods, 0.5),
            "seconds": 1.0,
        }

    figures = transfer.summarise({transfer.TEXT: [result(0.4, 0.9)] * 2, transfer.PICTURES: [result(0.3, 0.8)] * 2})
    names = {f"{op}_{way}" for op in transfer.OPERATIONS for way in ("text_to_pictures", "pictures_to_text")}
    assert set(figures["pairs"]) == names
    assert figures["best_ratio"] == pytest.approx(0.4 / 0.8), "text to pictures, of an expert trained on pictures"
    assert figures["best_pair"].endswith("text_to_pictures")
    assert figures["best_ratio_of_base"] == pytest.approx(0.1 / 0.8)
    assert "0.50 of what an expert" in page_of("transfer", transfer.EXPERIMENT, figures, tmp_path)


def test_nothing_is_transferred_where_nothing_was_learned(tmp_path: Path) -> None:
    nothing = {
        "seen": {"oracle": 0.0, "base": 0.0, "prompt": 0.0},
        "unseen": {"oracle": 0.0, "base": 0.0, "prompt": 0.0},
    }
    result = dict.fromkeys(transfer.OPERATIONS, nothing) | {
        "base_abilities": dict.fromkeys(nothing["seen"], 0.5),
        "seconds": 1.0,
    }
    figures = transfer.summarise({transfer.TEXT: [result], transfer.PICTURES: [result]})
    assert "best_ratio" not in figures
    assert "No expert learned anything" in page_of("transfer", transfer.EXPERIMENT, figures, tmp_path)


def test_robustness_by_what_was_learned_and_asked(tmp_path: Path) -> None:
    keys = dict.fromkeys(("own", "oracle", "own_to_oracle", "routing", "others_kept", "base_kept"), 0.5)
    variants = [
        *(f"renamed_{rows}" for rows in robustness.ROWS),
        "renamed_noisy10",
        "renamed_noisy30",
        "renamed",
        "later_15",
    ]
    learned = dict.fromkeys(variants, keys) | {"seconds": 1.0}
    asked = dict.fromkeys(("plain", *robustness.CIRCUMSTANCES), keys) | {
        "strangers": {"routing": 0.25},
        "seconds": 1.0,
    }
    figures = robustness.summarise({robustness.LEARNED: [learned] * 2, robustness.ASKED: [asked] * 2})
    assert figures["rows"]["4096"]["own_mean"] == 0.5
    assert figures["imbalance"]["routing_std"] == 0.0
    assert figures["strangers"]["routing_mean"] == 0.25
    page = page_of("robustness", robustness.EXPERIMENT, figures, tmp_path)
    assert "30% of the answers wrong" in page


def test_ablation_by_setting(tmp_path: Path) -> None:
    keys = "oracle", "prompt_new", "prompt_base_kept", "token_phatgoose_new", "token_phatgoose_base_kept"
    trained = {f"{ablation.LABEL}-{i}": [dict.fromkeys(keys, 0.5)] * SEEDS for i in range(len(ablation.TRAINED))}
    routed = {ablation.ONE: [{name: {"new": 0.5, "base_kept": 1.0} for name in ablation.ROUTED}] * SEEDS}
    prompts = {ablation.FEATURES: [{"covariance: shared by all": {"own": 0.9, "base": 0.8}, "seconds": 1.0}]}
    figures = ablation.summarise({**trained, **routed, **prompts})
    assert figures["prompts"] == {"covariance: shared by all": {"own_mean": 0.9, "base_mean": 0.8}}
    assert figures["trained"]["rank 4"]["prompt_new_mean"] == 0.5
    assert "covariance: shared by all" in page_of("ablation", ablation.EXPERIMENT, figures, tmp_path)


def test_streams_of_scale_are_all_there() -> None:
    run = scale.runs(0, lambda label, seed, stream, *own: stream)[0]
    names = [task["name"] for task in run.config["tasks"]]
    assert len(names) == 100
    assert {name.rpartition("_")[0] for name in names} == set(KINDS)
