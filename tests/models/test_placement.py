"""Where the parts of a base lie that is larger than one device."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipeline.config import BaseModelConfig
from pipeline.models.bases import Base, load_base
from pipeline.models.families import family_of
from pipeline.models.placement import device_map, largest_share, split
from pipeline.planning.architecture import base_configuration
from pipeline.routing.layer_classifiers import pooled
from tests.helpers import checksum

LARGE = Path(__file__).parents[2] / "jobs" / "configs" / "bases" / "internvl2_8b"


def test_devices_get_equal_shares_in_order() -> None:
    assert split([1] * 8, 2) == [0] * 4 + [1] * 4
    assert split([6, 1, 1, 1, 1, 1, 1], 2) == [0] + [1] * 6
    assert split([3, 3, 3], 1) == [0, 0, 0]
    assert largest_share([6, 1, 1, 1, 1, 1, 1], 2) == 6


@pytest.mark.parametrize("count", [2, 4])
def test_an_8b_base_is_cut_between_whole_layers(count: int) -> None:
    config = base_configuration(BaseModelConfig(path=str(LARGE)))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    devices = [f"cuda:{i}" for i in range(count)]
    placed = device_map(model, family_of(config), devices)
    parameters = dict.fromkeys(devices, 0)
    for name, parameter in model.named_parameters():
        (owner,) = [path for path in placed if name.startswith(f"{path}.")]
        parameters[placed[owner]] += parameter.numel()
    assert max(parameters.values()) <= 1.12 * sum(parameters.values()) / count
    layers = [placed[f"model.language_model.layers.{i}"] for i in range(config.text_config.num_hidden_layers)]
    assert layers == sorted(layers)
    assert placed["model.language_model.embed_tokens"] == placed["model.vision_tower"] == "cuda:0"
    assert placed["lm_head"] == devices[-1]
    blind = device_map(model, family_of(config), devices, vision=False)
    assert blind["model.vision_tower"] == "cpu"


def test_tied_embeddings_and_head_share_a_device(tiny_base: Base) -> None:
    placed = device_map(tiny_base.model, tiny_base.family, ["cuda:0", "cuda:1"])
    assert placed["lm_head"] == placed["model.language_model.embed_tokens"] == "cuda:0"
    assert set(placed.values()) == {"cuda:0", "cuda:1"}


def test_a_base_loads_part_by_part(tiny_base: Base) -> None:
    """All parts on one device here: a second real one is not to be had on a CPU."""
    config = BaseModelConfig(path=str(tiny_base.folder))
    for vision in (True, False):
        split = load_base(config, vision=vision, devices=("cpu", "cpu"))
        expected = load_base(config, vision=vision)
        assert checksum(split.model) == checksum(expected.model)
        assert split.model.device.type == "cpu"


def test_evidence_is_read_where_the_layer_lies() -> None:
    mean_BD = pooled(torch.zeros(2, 5, 8, device="meta"), torch.ones(2, 5, dtype=torch.bool))
    assert (mean_BD.device.type, mean_BD.shape) == ("meta", (2, 8))
