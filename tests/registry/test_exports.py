"""Exported folders: what stock PEFT computes with them, what vLLM's rules say, and that they appear whole or not at all."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from jobs.benchmark.tools.small_models import SMALL
from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.models.bases import Base, load_base
from pipeline.models.checkpoints import hub_id
from pipeline.models.families import TEXT, family_of
from pipeline.models.target_modules import adapted_paths
from pipeline.registry.bases import public_name
from pipeline.registry.experts import register_expert
from pipeline.registry.export_record import ExportError
from pipeline.registry.exports import VLLM_RANKS, ExportFormat, prepare_export, vllm_rank
from pipeline.registry.pools import register_pool
from pipeline.registry.successors import retire_expert
from pipeline.registry.tracking import tracked_run
from pipeline.registry.versions import get_version
from pipeline.routing import Pool
from pipeline.routing.adapters import Adapter
from pipeline.routing.peft_folder import padded, write_peft_folder
from tests.helpers import attached, batch_of, make_expert, prompts
from tests.registry import vllm_rules
from tests.registry.conftest import Created, new_experiment

RANKS = {"digits": 4, "clock": 8, "cards": 12}


@pytest.fixture(scope="module")
def pool(tiny_base: Base) -> Pool:
    experts = [make_expert(tiny_base, name, rank=rank, seed=rank) for name, rank in RANKS.items()]
    named = [replace(e, card=e.card.model_copy(update={"config_digest": f"d{e.card.rank}"})) for e in experts]
    return Pool("untrained", tiny_base.fingerprint, RouterConfig(), named)


@pytest.fixture(scope="module")
def version(
    created: Created, pool: Pool, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelVersion]:
    """Version 1 of a pool of three experts, registered in a database of the module's own."""
    folder = tmp_path_factory.mktemp("registry")
    experiment = new_experiment(created, folder / "store")
    with tracked_run(experiment, "demo", "run") as run:
        mlflow.log_text("stream: {tasks: [{name: digits, prompt: 'Answer: {question}'}]}", "config.yaml", run_id=run)
        experts = {
            name: register_expert("untrained", expert.save(folder / name)) for name, expert in pool.experts.items()
        }
        yield register_pool(pool, BaseModelConfig(path=str(tiny_folder)), name="demo", digest="p1", experts=experts)
    mlflow.set_tracking_uri("")


def export(version: ModelVersion, format: str, folder: Path, **more: Any) -> bool:
    scratch = folder.with_name(folder.name + " scratch")
    return prepare_export(version, ExportFormat(format), scratch, **more).write(folder)


@torch.inference_mode()
def logits(model: torch.nn.Module, base: Base) -> Tensor:
    rows = [*prompts(base.processor, "describe", 2), *prompts(base.processor, "repeat", 2)]
    return model(**batch_of(base, rows), use_cache=False).logits


def double_base(folder: Path) -> Base:
    """In float64: how far float32 rounds otherwise in two orders of the same sums depends on the machine."""
    base = load_base(BaseModelConfig(path=str(folder)))
    base.model.double()
    return base


def routed_logits(tiny_folder: Path, pool: Pool, name: str) -> Tensor:
    base = double_base(tiny_folder)
    with attached(base, pool) as routed, routed.forced(name):
        return logits(base.model, base)


def peft_logits(tiny_folder: Path, folder: Path) -> Tensor:
    base = double_base(tiny_folder)
    model = PeftModel.from_pretrained(base.model, folder, autocast_adapter_dtype=False).double()
    status = model.get_model_status()
    assert status.enabled
    assert status.trainable_params == 0
    return logits(model, base)


def test_stock_peft_computes_what_the_routed_expert_does(version, pool, tiny_folder, tmp_path) -> None:
    assert not export(version, "peft", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*RANKS, "README.md", "export.json", "processor"]
    )
    for name, rank in RANKS.items():
        folder = tmp_path / "out" / name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (rank, "untrained"), "no path of this machine"
        assert config["target_modules"] == sorted(pool.experts[name].adapters), "a list, not a regular expression"
        torch.testing.assert_close(
            peft_logits(tiny_folder, folder), routed_logits(tiny_folder, pool, name), rtol=1e-9, atol=1e-9
        )


def test_padded_to_ranks_of_vllm_it_is_the_same_update(version, pool, tiny_folder, tmp_path) -> None:
    export(version, "vllm", tmp_path / "out")
    for name, rank in zip(RANKS, (8, 8, 16), strict=True):
        folder = tmp_path / "out" / "adapters" / f"{name}-v1"
        config, weights = (
            json.loads((folder / "adapter_config.json").read_text()),
            load_file(folder / "adapter_model.safetensors"),
        )
        assert config["r"] == rank
        for path, adapter in pool.experts[name].adapters.items():
            a_RD, b_OR = (weights[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
            own = RANKS[name]
            assert a_RD[:own].equal(adapter.a_RD)
            assert b_OR[:, :own].equal(adapter.b_OR)
            assert not a_RD[own:].any()
            assert not b_OR[:, own:].any()
            assert config["lora_alpha"] / config["r"] == adapter.scaling
        torch.testing.assert_close(
            peft_logits(tiny_folder, folder), routed_logits(tiny_folder, pool, name), rtol=1e-9, atol=1e-9
        )


def test_an_export_passes_the_rules_of_vllm(version, pool, tmp_path) -> None:
    export(version, "vllm", tmp_path / "out", base_name="my/base")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    router = json.loads((tmp_path / "out" / "router.json").read_text())
    assert router == {"base": "my/base", "tasks": {name: f"{name}-v1" for name in RANKS}}
    assert manifest["max_lora_rank"] == 16
    cache = tmp_path / "out" / manifest["lora_resolver_cache_dir"]
    assert sorted(path.name for path in cache.iterdir()) == sorted(model["id"] for model in manifest["models"])
    assert vllm_rules.resolved(cache, "digits-v1", "other") is None
    for model in manifest["models"]:
        folder = vllm_rules.resolved(cache, model["id"], manifest["served_model_name"])
        assert folder == (tmp_path / "out" / model["path"]).resolve()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert vllm_rules.scaling(config, max_lora_rank=manifest["max_lora_rank"]) == 2.0
        modules = vllm_rules.loaded_modules(folder, "internvl")
        assert modules.keys() == {
            path.replace("model.language_model", "language_model.model")
            for path in pool.experts[model["task"]].adapters
        }
        for shapes in modules.values():
            assert shapes["lora_A"][0] == shapes["lora_B"][1] == model["rank"]


@pytest.mark.parametrize("name", SMALL)
def test_every_family_s_names_are_those_that_vllm_maps(name, tmp_path) -> None:
    model, _ = SMALL[name]()
    paths = adapted_paths(model, family_of(model.config) if name != "text" else TEXT, "auto")
    linears = {path: model.get_submodule(path) for path in paths}
    adapters = {
        p: Adapter(torch.ones(8, m.in_features), torch.ones(m.out_features, 8), 2.0) for p, m in linears.items()
    }
    write_peft_folder(tmp_path / "adapter", adapters, base_name=name)
    modules = vllm_rules.loaded_modules(tmp_path / "adapter", name)
    assert len(modules) == len(paths)
    assert all(len(shapes) == 2 for shapes in modules.values())


def test_the_rules_refuse_what_vllm_refuses(tmp_path) -> None:
    """Otherwise they would pass anything."""
    good = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    assert vllm_rules.scaling(good, max_lora_rank=8) == 2.0
    for more in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"r": 12}):
        with pytest.raises(ValueError, match="unsupported|greater"):
            vllm_rules.scaling(good | more, max_lora_rank=8)
    with pytest.raises(ValueError, match="not one of"):
        vllm_rules.scaling(good, max_lora_rank=12)
    tower = {"model.vision_tower.encoder.layer.0.q_proj": Adapter(torch.ones(8, 4), torch.ones(4, 8), 1.0)}
    write_peft_folder(tmp_path / "tower", tower, base_name="b")
    with pytest.raises(ValueError, match="no module of the language model"):
        vllm_rules.loaded_modules(tmp_path / "tower", "internvl")


def test_ranks_are_the_least_that_vllm_has_and_keep_the_scaling() -> None:
    assert [vllm_rank("x", rank, 2.0) for rank in (1, 2, 8, 12, 64, 65, 512)] == [1, 8, 8, 16, 64, 128, 512]
    scaling = 16 / 12
    assert all(scaling * r / r == scaling for r in VLLM_RANKS if r != 320), "powers of two change no digit"
    with pytest.raises(ExportError, match="rank 600; vLLM serves at most 512: export it with --format peft"):
        vllm_rank("x", 600, 2.0)


def test_padding_computes_the_same_product() -> None:
    random = torch.Generator().manual_seed(0)
    small = Adapter(torch.randn(12, 64, generator=random), torch.randn(48, 12, generator=random), 1.0)
    wide = padded(small, 16)
    torch.testing.assert_close(wide.b_OR @ wide.a_RD, small.b_OR @ small.a_RD, rtol=1e-6, atol=1e-6)


def test_an_expert_s_page_says_how_to_prompt_it(version, tmp_path) -> None:
    export(version, "peft", tmp_path / "out")
    page = (tmp_path / "out" / "digits" / "README.md").read_text()
    assert "base_model: untrained" in page
    assert "`Answer: {question}`" in page
    assert "torchvision" in page, "which the stock class of this base's processor asks for"
    assert 'PeftModel.from_pretrained(model, "digits")' in page
    assert "does not say the prompt template" in (tmp_path / "out" / "clock" / "README.md").read_text()
    assert str(tmp_path) not in page


def test_the_base_s_processor_is_one_that_stock_classes_load(version, tiny_base, tmp_path) -> None:
    export(version, "peft", tmp_path / "out")
    folder = tmp_path / "out" / "processor"
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert json.loads((folder / "processor_config.json").read_text())["processor_class"] == "InternVLProcessor"
    assert tokenizer.video_token == "<unk>", "InternVLProcessor asks for one"
    assert len(tokenizer) == len(tiny_base.processor.tokenizer), "and the vocabulary is the base's"
    assert type(images) is type(tiny_base.processor.image_processor)
    assert not list(folder.glob("*.safetensors"))


def test_an_exported_pool_answers_as_the_registered_one(version, pool, tiny_folder, tmp_path) -> None:
    export(version, "pool", tmp_path / "out")
    loaded = Pool.load(tmp_path / "out")
    assert loaded.names == list(RANKS)
    assert routed_logits(tiny_folder, loaded, "cards").equal(routed_logits(tiny_folder, pool, "cards"))
    assert "`models:/untrained.base/1`" in (tmp_path / "out" / "README.md").read_text()
    export(version, "pool", tmp_path / "two", experts=["digits", "cards"])
    assert Pool.load(tmp_path / "two").names == ["digits", "cards"]


def test_one_expert_s_version_alone(version, tmp_path) -> None:
    alone = get_version("untrained.expert.clock", 1)
    export(alone, "peft", tmp_path / "peft")
    export(alone, "vllm", tmp_path / "vllm")
    assert Path(tmp_path / "peft" / "clock" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "vllm" / "router.json").read_text())["tasks"] == {"clock": "clock-v1"}
    with pytest.raises(ExportError, match="is an expert; name a pool"):
        export(alone, "pool", tmp_path / "pool")


def test_exporting_again_finds_it_complete_and_anything_else_in_its_place(version, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert not export(version, "peft", out), "an empty folder is written"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert export(version, "peft", out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ExportError, match="holds another export .peft of untrained.pool.demo/1, 3 experts"):
        export(version, "vllm", out)
    (out / "digits" / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match="digits/adapter_model.safetensors is missing or was changed"):
        export(version, "peft", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(ExportError, match="is not empty and no export; name another folder"):
        export(version, "peft", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "keep"
    with pytest.raises(ExportError, match="is a file"):
        export(version, "peft", tmp_path / "mine" / "notes")


def test_an_export_that_fails_leaves_nothing(version, tmp_path, monkeypatch) -> None:
    prepared = prepare_export(version, ExportFormat.PEFT, tmp_path / "scratch")

    def fail(name: str) -> None:
        if name == "cards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.write(tmp_path / "out", fail)
    assert not list(tmp_path.glob("out*"))
    seen: list[str] = []
    assert not prepared.write(tmp_path / "out", seen.append)
    assert seen == list(RANKS)


def test_no_more_than_one_expert_s_weights_are_held(version, tmp_path) -> None:
    prepared = prepare_export(version, ExportFormat.VLLM, tmp_path / "scratch")
    prepared.write(tmp_path / "out")
    assert not any("expert" in vars(entry) for entry in prepared.experts.values())


def test_a_retired_expert_is_the_base_s(version, pool, tmp_path) -> None:
    later = retire_expert(version, "clock")
    export(later, "vllm", tmp_path / "out")
    tasks = json.loads((tmp_path / "out" / "router.json").read_text())["tasks"]
    assert tasks == {"digits": "digits-v1", "cards": "cards-v1", "clock": "untrained"}
    assert not (tmp_path / "out" / "adapters" / "clock-v1").exists()


def test_a_base_is_called_by_a_name_that_others_know(version) -> None:
    assert [hub_id(path) for path in ("tiny", "OpenGVLab/InternVL3-8B-hf")] == ["tiny", "OpenGVLab/InternVL3-8B-hf"]
    assert [hub_id(path) for path in ("/data/bases/internvl2_8b", "s3://bucket/base", "~/base", "./runs/base")] == [
        None
    ] * 4
    assert public_name(get_version("untrained.base", 1)) == "untrained", "a local folder's name in the registry"
