"""Adapters that others have trained: what becomes an expert of the base, and one refusal for everything else."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.benchmark.tools.small_models import SMALL, write_small
from pipeline.config import BaseModelConfig
from pipeline.models.bases import Base, load_base
from pipeline.models.target_modules import base_linears
from pipeline.routing.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapters
from pipeline.routing.foreign import foreign_adapter
from pipeline.routing.foreign_config import ForeignAdapterError
from pipeline.routing.foreign_names import BaseLinears
from tests.helpers import LANGUAGE_LINEARS, batch_of, prompts

Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def linears(tiny_folder: Path) -> BaseLinears:
    return base_linears(BaseModelConfig(path=str(tiny_folder)))


def fresh_base(tiny_folder: Path) -> Base:
    return load_base(BaseModelConfig(path=str(tiny_folder)))


def train_with_peft(base: Base, folder: Path, **settings: Any) -> Path:
    """Writes an adapter as PEFT does, with random values in place of training."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_LINEARS, "task_type": "CAUSAL_LM"} | settings
    )
    model = get_peft_model(base.model, config)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with_peft(fresh_base(tiny_folder), tmp_path_factory.mktemp("foreign") / "sums")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "sums")
    return tmp_path / "sums"


def configured(folder: Path, **fields: Any) -> Path:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def changed(folder: Path, change: Any) -> Path:
    """Writes the tensors that `change` returns of those that are there."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({key: tensor.contiguous() for key, tensor in change(dict(tensors)).items()}, folder / ADAPTER_WEIGHTS)
    return folder


def renamed(folder: Path, old: str, new: str) -> Path:
    return changed(folder, lambda tensors: {re.sub(old, new, key): t for key, t in tensors.items()})


@torch.inference_mode()
def logits(base: Base, model: torch.nn.Module) -> Tensor:
    rows = [*prompts(base.processor, "describe", 2), *prompts(base.processor, "repeat", 1)]
    return model(**batch_of(base, rows), use_cache=False).logits


def test_a_plain_lora_stays_as_it_is_to_the_last_bit(trained: Path, linears: BaseLinears, tmp_path: Path) -> None:
    adapter = foreign_adapter(trained, linears)
    weights = load_file(trained / ADAPTER_WEIGHTS)
    assert (adapter.rank, adapter.alpha, len(adapter.adapters)) == (4, 8.0, 28)
    for path, each in adapter.adapters.items():
        assert each.a_RD.equal(weights[f"base_model.model.{path}.lora_A.weight"])
        assert each.b_OR.equal(weights[f"base_model.model.{path}.lora_B.weight"])
        assert each.scaling == 2.0
    adapter.save(tmp_path / "own")
    again = foreign_adapter(tmp_path / "own", linears)
    assert again.content == adapter.content
    assert load_adapters(tmp_path / "own")[1].keys() == adapter.adapters.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "r": 6},
        {"rank_pattern": {"q_proj": 12, "layers.1.mlp.down_proj": 2}},
        {"alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 20}},
        {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 5, "o_proj": 1}, "use_rslora": True},
    ],
)
def test_other_ranks_and_scalings_become_one_and_compute_the_same(
    settings: dict[str, Any], tiny_folder: Path, linears: BaseLinears, tmp_path: Path
) -> None:
    train_with_peft(fresh_base(tiny_folder), tmp_path / "theirs", **settings)
    adapter = foreign_adapter(tmp_path / "theirs", linears)
    adapter.save(tmp_path / "own")
    assert len({(len(a.a_RD), a.scaling) for a in adapter.adapters.values()}) == 1
    base = fresh_base(tiny_folder)
    theirs = logits(base, PeftModel.from_pretrained(base.model, tmp_path / "theirs"))
    base = fresh_base(tiny_folder)
    own = logits(base, PeftModel.from_pretrained(base.model, tmp_path / "own"))
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=2e-5)  # B was multiplied, and rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_become_float32(dtype: torch.dtype, folder: Path, linears: BaseLinears) -> None:
    changed(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    adapter = foreign_adapter(folder, linears)
    for path, each in adapter.adapters.items():
        assert each.a_RD.dtype == torch.float32
        assert each.a_RD.equal(load_file(folder / ADAPTER_WEIGHTS)[f"base_model.model.{path}.lora_A.weight"].float())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"model\.model\.language_model\.", "model.language_model.model."),
        (r"model\.model\.language_model\.", "model.model."),
        (r"model\.model\.language_model\.", "model."),
        (r"^base_model\.model\.", ""),
        (r"base_model\.model\.model\.language_model\.", "language_model.base_model.model.model."),
        (r"\.(lora_[AB])\.weight", r".\1.default.weight"),
    ],
)
def test_names_of_other_releases_are_understood(
    old: str, new: str, folder: Path, trained: Path, linears: BaseLinears
) -> None:
    renamed(folder, old, new)
    assert foreign_adapter(folder, linears).content == foreign_adapter(trained, linears).content


@pytest.mark.parametrize("name", SMALL)
def test_adapters_of_every_family(name: str, tmp_path: Path) -> None:
    base = load_base(BaseModelConfig(path=str(write_small(name, tmp_path / "base"))))
    linears = base_linears(BaseModelConfig(path=str(tmp_path / "base")))
    train_with_peft(base, tmp_path / "adapter", target_modules=base.family.linears)
    assert foreign_adapter(tmp_path / "adapter", linears).adapters.keys() == linears.routable


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; only LORA can be routed"),
    ({"peft_type": None}, r"peft_type is None"),
    ({"use_dora": True}, r"use_dora is set: DoRA scales.*without use_dora"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is set"),
    ({"bias": "all"}, r"bias is 'all'.*with bias 'none'"),
    ({"lora_bias": True}, r"lora_bias is set"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices is set"),
    ({"layer_replication": [[0, 2]]}, r"layer_replication is set"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which changes the base's weights"),
    ({"r": 8}, r"has rank 4, and adapter_config.json says 8"),
    ({"r": 0}, r"r is 0, expected a number from 1 on"),
    ({"r": True}, r"r is True, expected"),
    ({"r": "4"}, r"r is '4', expected"),
    ({"lora_alpha": float("nan")}, r"lora_alpha is nan, expected a number above 0"),
    ({"lora_alpha": None}, r"lora_alpha is None, expected"),
    ({"lora_alpha": 10**400}, r"lora_alpha is 1000.*expected a number above 0"),
    ({"lora_alpha": 1e300}, r"lora_alpha, or alpha_pattern, makes the update of .* larger than float32 holds"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern is \['q_proj'\], expected an object"),
    ({"rank_pattern": {"(a+)+b": 4}}, r"rank_pattern: '\(a\+\)\+b' is a regular expression; write the Linears' names"),
    ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight' has rank 4, and adapter_config.json says 2"),
    ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern.q_proj is -1.*expected a number above 0"),
    ({"base_model_name_or_path": 3}, r"base_model_name_or_path is 3, expected a name"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_a_configuration_that_cannot_be_routed(
    fields: dict[str, Any], message: str, folder: Path, linears: BaseLinears
) -> None:
    configured(folder, **fields)
    with pytest.raises(ForeignAdapterError, match=message) as raised:
        foreign_adapter(folder, linears)
    assert ADAPTER_CONFIG in str(raised.value)
    assert "\n" not in str(raised.value)


def first(tensors: dict[str, Tensor], key: str, tensor: Tensor) -> dict[str, Tensor]:
    return tensors | {f"{Q_PROJ}.{key}": tensor}


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


BAD_TENSORS: list[tuple[Any, str]] = [
    (lambda t: first(t, "lora_A.weight", torch.full((4, 128), float("nan"))), r"q_proj.lora_A.weight' holds a value"),
    (lambda t: first(t, "lora_B.weight", torch.full((128, 4), float("inf"))), r"q_proj.lora_B.weight' holds a value"),
    (lambda t: first(t, "lora_B.weight", torch.ones(128, 3)), r"has rank 4, its B has rank 3"),
    (lambda t: first(t, "lora_B.weight", torch.ones(64, 4)), r"from 128 to 64 features, and the base's has 128 to 128"),
    (lambda t: first(t, "lora_A.weight", torch.ones(4, 256)), r"from 256 to 128 features, and the base's has 128 to 128"),
    (lambda t: first(t, "lora_A.weight", torch.ones(4)), r"have shapes \[4\] and \[128, 4\], expected matrices"),
    (lambda t: first(t, "lora_A.weight", torch.ones(4, 128).double()), r"is F64; save the adapter as float32"),
    (lambda t: first(t, "lora_A.weight", torch.ones(4, 128).to(torch.int8)), r"is I8; save the adapter as"),
    (lambda t: without(t, f"{Q_PROJ}.lora_B"), r"q_proj has no lora_B"),
    (lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()}, r"every B is zero: it was never"),
    (lambda t: {}, r"holds no tensor"),
    (lambda t: first(t, "lora_A.other.weight", torch.ones(4, 128)), r"names of more than one adapter"),
    (lambda t: t | {f"{Q_PROJ.replace('base_model.model.', '')}.lora_A.weight": torch.ones(4, 128)},
     r"are the same half of one Linear"),
    (lambda t: t | {f"{Q_PROJ.replace('language_model.', '')}.lora_A.weight": torch.ones(4, 128)},
     r"names of more than one base's language model"),
    (lambda t: first(t, "lora_magnitude_vector.weight", torch.ones(128)), r"is DoRA's"),
    (lambda t: first(t, "lora_B.bias", torch.ones(128)), r"is a bias"),
    (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(4, 4)}, r"is a whole layer \(modules_to_save\)"),
    (lambda t: t | {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": torch.ones(4, 9)},
     r"is a LoRA of embeddings"),
    (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)}, r"is outside the language model's layers"),
    (lambda t: t | {"base_model.model.model.vision_tower.encoder.layer.0.attention.q_proj.lora_A.weight": torch.ones(4, 128)},
     r"is outside the language model's layers, where the router cannot weigh it; train with target_modules of the language"),
    (lambda t: t | {"base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_A.weight": torch.ones(4, 128)},
     r"is outside the language model's layers"),
    (lambda t: t | {f"{Q_PROJ.replace('layers.0', 'layers.9')}.lora_A.weight": torch.ones(4, 128)},
     r"is of layer 9, and the base has 4 layers: it is an adapter of another base"),
    (lambda t: t | {"base_model.model.../../etc/passwd.lora_A.weight": torch.ones(4, 128)}, r"is of no Linear of the base"),
    (lambda t: {k.replace("q_proj", "c_attn"): v for k, v in t.items()},
     r"c_attn.lora_A.weight' is of no Linear of the base, whose tensors are called such as "
     r"'base_model.model.model.language_model.layers.0"),
    (lambda t: t | {"language_model.model.layers.0.attention.wqkv.lora_A.weight": torch.ones(4, 128)},
     r"InternVL's own code, where query, key and value are one Linear.*convert-internvl2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_tensors_that_are_no_lora_of_this_base(change: Any, message: str, folder: Path, linears: BaseLinears) -> None:
    changed(folder, change)
    with pytest.raises(ForeignAdapterError, match=message) as raised:
        foreign_adapter(folder, linears)
    assert ADAPTER_WEIGHTS in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_number_of_layers_is_the_base_s_or_chosen(folder: Path, linears: BaseLinears) -> None:
    changed(folder, lambda tensors: without(tensors, "layers.3"))
    foreign_adapter(folder, linears)  # its regular expression may have chosen them
    configured(folder, target_modules=["q_proj", "up_proj"])
    with pytest.raises(ForeignAdapterError, match=r"has those of 3; the base has 4: it is an adapter of another base"):
        foreign_adapter(folder, linears)
    assert len(foreign_adapter(configured(folder, layers_to_transform=[0, 1, 2]), linears).adapters) == 21


@pytest.mark.parametrize(
    ("own", "named", "fits"),
    [
        ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL3-8B", True),
        ("OpenGVLab/InternVL3-8B-hf", "OpenGVLab/InternVL2-8B", False),
        ("OpenGVLab/InternVL3-8B-hf", "/data/models/whatever", True),
        ("OpenGVLab/InternVL3-8B-hf", None, True),
        ("OpenGVLab/InternVL3-8B-hf", "", True),
        ("/data/bases/converted", "OpenGVLab/InternVL2-8B", True),
    ],
)
def test_a_base_of_another_public_name_is_another(
    own: str, named: str | None, fits: bool, folder: Path, linears: BaseLinears
) -> None:
    configured(folder, base_model_name_or_path=named)
    other = BaseLinears(linears.shapes, linears.language, linears.routable, (own,), is_public=not own.startswith("/"))
    if fits:
        foreign_adapter(folder, other)
    else:
        with pytest.raises(
            ForeignAdapterError, match=r"base_model_name_or_path is 'OpenGVLab/InternVL2-8B', and the base is"
        ):
            foreign_adapter(folder, other)


def test_pickles_are_never_read(folder: Path, linears: BaseLinears) -> None:
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    foreign_adapter(folder, linears)  # safetensors lie beside them
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(
        ForeignAdapterError, match=r"adapter_model.bin: pickled weights can run code.*s.save_file\(torch.load"
    ):
        foreign_adapter(folder, linears)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_links_do_not_leave_the_folder(name: str, folder: Path, linears: BaseLinears) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    with pytest.raises(ForeignAdapterError, match=rf"{name} is missing"):
        foreign_adapter(folder, linears)
    (folder / name).symlink_to("../elsewhere")
    with pytest.raises(ForeignAdapterError, match=rf"{name}: is a link to a file outside the folder; copy.*cp -rL"):
        foreign_adapter(folder, linears)
    (folder / name).unlink()
    (folder.parent / "elsewhere").rename(folder / "inside")
    (folder / name).symlink_to("inside")
    foreign_adapter(folder, linears)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ForeignAdapterError, match=rf"{name}: is no file"):
        foreign_adapter(folder, linears)


def test_damaged_files_are_named(folder: Path, linears: BaseLinears) -> None:
    file = folder / ADAPTER_WEIGHTS
    whole = file.read_bytes()
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    for damaged, reason in (
        (whole[: len(whole) // 2], ""),
        (b"", ""),
        (b"\xff" * 64, "a header of"),
        (struct.pack("<Q", len(twice)) + twice + bytes(4), "'a' stands there twice"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ForeignAdapterError, match=rf"{ADAPTER_WEIGHTS}: no valid safetensors file: .*{reason}"):
            foreign_adapter(folder, linears)
    file.write_bytes(whole)
    for text, reason in (
        ('{"r": 4, "r": 8}', "'r' stands there twice"),
        ("{", "cannot be read"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "cannot be read"),
        ("\xff", "cannot be read"),
    ):
        (folder / ADAPTER_CONFIG).write_bytes(text.encode("latin-1"))
        with pytest.raises(ForeignAdapterError, match=rf"{ADAPTER_CONFIG}: .*{reason}"):
            foreign_adapter(folder, linears)
    with pytest.raises(ForeignAdapterError, match="no such folder"):
        foreign_adapter(folder / "nothing", linears)
