import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import BaseModelConfig
from pipeline.models.bases import as_loadable_here, load_base
from pipeline.models.checkpoints import BaseError, checkpoint, fingerprint
from tests.helpers import checksum


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "mine")


def change_a_weight(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_base_is_frozen_and_ready(tiny_base, tiny_folder):
    assert not any(p.requires_grad for p in tiny_base.model.parameters())
    assert not tiny_base.model.training
    assert tiny_base.model.dtype == torch.float32
    assert (tiny_base.label, tiny_base.folder, tiny_base.width) == ("untrained", tiny_folder, 128)
    assert tiny_base.fingerprint == fingerprint(tiny_folder)


def test_loading_twice_gives_the_same_weights(tiny_base, tiny_folder):
    again = load_base(BaseModelConfig(path=str(tiny_folder), name="mine"))
    assert checksum(again.model) == checksum(tiny_base.model)
    assert again.label == "mine"


def test_half_precision_is_a_setting(tiny_folder):
    assert load_base(BaseModelConfig(path=str(tiny_folder), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_a_copy_has_the_same_fingerprint(folder, tiny_base):
    (folder / "notes.txt").write_text("not part of the model")
    assert fingerprint(folder) == tiny_base.fingerprint
    assert len(tiny_base.fingerprint) == 16


def test_the_fingerprint_changes_with_a_weight(folder, tiny_base):
    change_a_weight(folder)
    assert fingerprint(folder) != tiny_base.fingerprint


def test_the_fingerprint_changes_with_a_weight_while_the_folder_is_known(folder, tiny_base):
    assert fingerprint(folder) == tiny_base.fingerprint
    change_a_weight(folder)
    assert fingerprint(folder) != tiny_base.fingerprint


def test_the_fingerprint_changes_with_the_architecture(folder, tiny_base):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) != tiny_base.fingerprint


def test_code_that_comes_with_a_checkpoint_does_not_run(folder, tiny_base):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.Config", "AutoModelForImageTextToText": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    mark = folder / "ran"
    (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    base = load_base(BaseModelConfig(path=str(folder)))
    assert not mark.exists()
    assert type(base.model) is type(tiny_base.model)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(BaseError, match=rf"base\.path: {tmp_path}/none does not exist; give a checkpoint folder"):
        load_base(BaseModelConfig(path=f"{tmp_path}/none"))
    with pytest.raises(BaseError, match=r"base\.path: internvl does not exist"):
        load_base(BaseModelConfig(path="internvl"))


@pytest.mark.parametrize("path", ["nobody/no-such-base", "runs/not a base"])
def test_a_hub_id_that_cannot_be_had_is_named(path, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseError, match=rf"base\.path: {path} is not a local folder, and not found on the hub"):
        checkpoint(BaseModelConfig(path=path))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        BaseError, match=r"mine holds no config\.json with \*\.safetensors \(pickled weights are refused"
    ):
        load_base(BaseModelConfig(path=str(folder)))


def test_weights_without_a_configuration_are_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(BaseError, match=r"mine holds no config\.json"):
        load_base(BaseModelConfig(path=str(folder)))


def test_flash_attention_that_is_not_here_is_an_error_or_of_another_machines_base_sdpa(tiny_folder, caplog):
    config = BaseModelConfig(path=str(tiny_folder), attention="flash_attention_2")
    with pytest.raises(BaseError, match=r"base\.attention: flash_attention_2 needs .*; set base\.attention to sdpa"):
        load_base(config)
    assert as_loadable_here(config).attention == "sdpa"
    assert "flash_attention_2 is not available on this machine" in caplog.text
    eager = config.model_copy(update={"attention": "eager"})
    assert as_loadable_here(eager) is eager
