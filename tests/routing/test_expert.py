import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.routing import Expert, ExpertError, PromptStatistics
from pipeline.routing.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, load_adapters
from pipeline.routing.contents import CONTENTS
from pipeline.routing.expert import CARD, ROUTER_WEIGHTS
from pipeline.routing.features import feature_width
from pipeline.routing.layer_classifiers import WIDTH
from pipeline.routing.serialization import OutdatedError, layer_tensors, statistics_tensors
from tests.helpers import make_expert

FILES = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, ROUTER_WEIGHTS, CARD]
ALL = [*FILES, CONTENTS]


@pytest.fixture(scope="module")
def expert(tiny_base):
    return make_expert(tiny_base, "digits", rank=3, features=torch.randn(16, 512), quantile=0.9)


@pytest.fixture
def folder(expert, tmp_path):
    return expert.save(tmp_path / "digits")


def change_config(folder, **values):
    (folder / CONTENTS).unlink()  # as PEFT's own folders have none
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_adapters(expert, change) -> Expert:
    """Returns the expert with `change(adapter)` in place of every adapter."""
    return dataclasses.replace(expert, adapters={path: change(a) for path, a in expert.adapters.items()})


def test_a_folder_gives_back_what_was_saved(expert, folder):
    loaded = Expert.load(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(ALL)
    assert loaded.card == expert.card
    assert loaded.adapter_config == expert.adapter_config
    assert len(loaded.adapters) == 4 * 7
    assert loaded.adapters.keys() == expert.adapters.keys() == loaded.vectors.keys()
    for path, adapter in expert.adapters.items():
        assert loaded.adapters[path].a_RD.equal(adapter.a_RD)
        assert loaded.adapters[path].b_OR.equal(adapter.b_OR)
        assert loaded.adapters[path].scaling == adapter.scaling == 2.0
        assert loaded.vectors[path].equal(expert.vectors[path])
    assert loaded.statistics.count == 16
    assert loaded.statistics.threshold == expert.statistics.threshold < float("inf")
    assert loaded.statistics.mean_F.equal(expert.statistics.mean_F)
    torch.testing.assert_close(
        loaded.statistics.scatter_FF, expert.statistics.scatter_FF, rtol=1e-6, atol=0
    )  # kept in float32


def test_an_uncalibrated_threshold_stays_infinite(tiny_base, tmp_path):
    loaded = Expert.load(make_expert(tiny_base, "clock").save(tmp_path / "clock"))
    assert loaded.statistics.threshold == float("inf")


def test_saving_replaces_the_folder_entirely(tiny_base, folder):
    (folder / "old.txt").write_text("left over")
    make_expert(tiny_base, "clock", rank=2).save(folder)
    assert Expert.load(folder).card.name == "clock"
    assert sorted(p.name for p in folder.iterdir()) == sorted(ALL)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_folder_names_the_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ExpertError, match=rf"digits: {name} is missing"):
        Expert.load(folder)


@pytest.mark.parametrize(
    ("values", "output"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ],
)
def test_other_than_plain_lora_is_refused(folder, values, output):
    change_config(folder, **values)
    with pytest.raises(ExpertError, match=rf"{ADAPTER_CONFIG}: only plain LoRA can be routed; .*{output}"):
        Expert.load(folder)


def test_a_tensor_that_is_no_lora_is_refused(folder):
    weights = load_file(folder / ADAPTER_WEIGHTS)
    save_file(weights | {"base_model.model.lm_head.weight": torch.ones(2)}, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ExpertError, match=rf"{ADAPTER_WEIGHTS}: unexpected tensor 'base_model.model.lm_head.weight'"):
        list(Expert.load(folder).adapters)


def test_half_a_lora_is_refused(folder):
    weights = load_file(folder / ADAPTER_WEIGHTS)
    lost = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"
    del weights[lost]
    save_file(weights, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ExpertError, match=rf"{ADAPTER_WEIGHTS}: .*layers\.1\.mlp\.up_proj.* lora_B"):
        list(Expert.load(folder).adapters)


def test_rank_stabilised_lora_is_scaled_by_the_root(folder):
    change_config(folder, use_rslora=True)
    _, adapters = load_adapters(folder)
    assert next(iter(adapters.values())).scaling == pytest.approx(6 / 3**0.5)


def test_a_trained_expert_passes(expert):
    expert.check_trained()


def test_an_untrained_expert_is_refused(expert):
    untrained = with_adapters(expert, lambda a: Adapter(a.a_RD, torch.zeros_like(a.b_OR), a.scaling))
    with pytest.raises(ExpertError, match="expert 'digits': every LoRA B is zero, so it was never trained"):
        untrained.check_trained()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(expert, value):
    broken = with_adapters(expert, lambda a: Adapter(a.a_RD, a.b_OR + value, a.scaling))
    with pytest.raises(ExpertError, match=r"expert 'digits': a weight is not finite; lower expert\.learning_rate"):
        broken.check_trained()
    vectors = {path: vector * value for path, vector in expert.vectors.items()}
    with pytest.raises(ExpertError, match="not finite"):
        dataclasses.replace(expert, vectors=vectors).check_trained()


def test_statistics_weigh_little_beside_a_lora_of_internvl2_2b():
    """InternLM2-1.8B: 24 layers, width 2048, 8 key-value heads of 128, intermediate width 8192; rank 16 in bfloat16."""
    width, keys, inner, layers, rank = 2048, 1024, 8192, 24, 16
    linears = [(width, width), (width, keys), (width, keys), (width, width), *[(width, inner)] * 2, (inner, width)]
    lora = 2 * layers * rank * sum(d + o for d, o in linears)
    prompt = PromptStatistics.of(torch.randn(4, feature_width(width, None)))
    observed = PromptStatistics.of(torch.randn(4, WIDTH))  # at the inputs of query, output, gate and down
    layer_statistics = {
        f"layers.{layer}.{name}": observed for layer in range(layers) for name in ("q", "o", "gate", "down")
    }
    tensors = statistics_tensors(prompt) | layer_tensors(layer_statistics)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 0.05 * lora


def test_statistics_of_an_older_version_are_refused_with_the_command_that_renews_them(folder):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"feature_rule": card["feature_rule"] - 1, "unknown": 1}))
    (folder / "contents.json").unlink()
    save_file({"statistics.moment": torch.zeros(1)}, folder / ROUTER_WEIGHTS)
    with pytest.raises(
        OutdatedError, match=r"expert\.json: feature_rule is .*recompute-statistics CONFIG --pool POOL`"
    ):
        Expert.load(folder)


def test_a_router_file_without_statistics_is_named(folder):
    (folder / "contents.json").unlink()
    save_file({"vector.x": torch.zeros(1)}, folder / ROUTER_WEIGHTS)
    with pytest.raises(ExpertError, match=rf"{ROUTER_WEIGHTS}: damaged, or of another version: 'statistics.count'"):
        assert Expert.load(folder).statistics.count


def test_another_process_gets_statistics_that_are_read_there(folder):
    expert = pickle.loads(pickle.dumps(Expert.load(folder)))
    assert expert.statistics.count == 16
    assert expert.statistics.scatter_FF.equal(Expert.load(folder).statistics.scatter_FF)
    assert expert.vectors.keys() == Expert.load(folder).vectors.keys()
