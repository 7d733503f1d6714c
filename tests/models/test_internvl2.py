"""Conversion against the original architecture, written anew in `original_model`."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pipeline.models.internvl2 import ConversionError, convert
from pipeline.models.internvl2.names import split_grouped
from tests.models import original
from tests.models.original import small_config, write_folder, write_weights
from tests.models.original_model import OriginalModel

INTERNLM2, QWEN2, PHI3, LLAMA = "InternLM2ForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM"
TOWERS = {"300m": original.VISION_300M, "6b": original.VISION_6B}


def load(folder: Path) -> Any:
    """Loads a converted folder; every weight comes from it and every weight in it is used."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    return model.eval()


def assert_same_logits(
    folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, length: int = 24
) -> None:
    model = load(folder)
    random = torch.Generator().manual_seed(5)
    image = model.config.image_token_id
    input_ids = torch.randint(3, 200, (2, length), generator=random)
    input_ids[0, 3:7] = image  # one tile in the first row,
    input_ids[1, 1:9] = image  # two in the second
    pixels = torch.randn(3, 3, 56, 56, generator=random)
    original = OriginalModel(config, weights, image)
    with torch.inference_mode():
        tokens = model.model.get_image_features(pixels, return_dict=True).pooler_output
        torch.testing.assert_close(tokens, original.vision(pixels), rtol=0, atol=1e-5)
        logits = model(input_ids=input_ids, pixel_values=pixels).logits
        torch.testing.assert_close(logits, original(input_ids, pixels), rtol=0, atol=1e-5)
        logits = model(input_ids=input_ids.clamp(max=199)).logits
        torch.testing.assert_close(logits, original(input_ids.clamp(max=199)), rtol=0, atol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("language_class", [INTERNLM2, QWEN2, PHI3, LLAMA])
@pytest.mark.parametrize("tower", TOWERS)
def test_the_converted_model_computes_what_the_original_one_does(tmp_path, language_class, tower):
    config = small_config(language_class, TOWERS[tower])
    weights = write_folder(tmp_path / "source", config)
    done = convert(tmp_path / "source", tmp_path / "target")
    assert done.parameters == sum(tensor.numel() for tensor in weights.values())
    assert_same_logits(done.folder, config, weights)


@pytest.mark.parametrize(
    "options", [{"files": 1}, {"files": 4}, {"files": 1, "pickled": True}, {"files": 3, "pickled": True}]
)
def test_one_file_or_several_safetensors_or_pickled(tmp_path, options):
    config = small_config()
    weights = write_folder(tmp_path / "source", config, **options)
    assert_same_logits(convert(tmp_path / "source", tmp_path / "target").folder, config, weights)


def test_biases_and_as_many_keys_as_queries(tmp_path):
    config = small_config(bias=True, num_key_value_heads=6)
    weights = write_folder(tmp_path / "source", config)
    assert_same_logits(convert(tmp_path / "source", tmp_path / "target").folder, config, weights)


def test_an_output_layer_that_is_not_stored_is_the_embedding(tmp_path):
    config = small_config(QWEN2, tie_word_embeddings=True)
    write_folder(tmp_path / "source", config, files=1)
    weights = load_file(tmp_path / "source" / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    write_weights(tmp_path / "source", weights, files=1)
    done = convert(tmp_path / "source", tmp_path / "target")
    assert done.parameters == sum(tensor.numel() for tensor in weights.values())
    assert_same_logits(done.folder, config, weights)


@pytest.mark.parametrize("length", [16, 17, 40])
def test_dynamic_rotary_embeddings_grow_as_internlm2s_do(tmp_path, length):
    """Up to `max_position_embeddings` and beyond."""
    config = small_config(max_position_embeddings=16, rope_theta=100)
    weights = write_folder(tmp_path / "source", config)
    assert_same_logits(convert(tmp_path / "source", tmp_path / "target").folder, config, weights, length=length)


@pytest.mark.parametrize("length", [20, 21])
def test_long_rotary_embeddings_switch_as_phi3s_do(tmp_path, length):
    config = small_config(PHI3)
    weights = write_folder(tmp_path / "source", config)
    assert_same_logits(convert(tmp_path / "source", tmp_path / "target").folder, config, weights, length=length)


def test_linear_rotary_embeddings_are_kept(tmp_path):
    config = small_config(LLAMA, rope_scaling={"type": "linear", "factor": 4.0})
    write_folder(tmp_path / "source", config)
    text = load(convert(tmp_path / "source", tmp_path / "target").folder).config.text_config
    assert text.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}


def test_grouped_projections_are_taken_apart_head_by_head():
    """Two key-value heads of width 2 with three query heads each; a row holds its own name."""
    names = [f"{name}{head}{row}" for head in "01" for name in ("a", "b", "c", "k", "v") for row in "xy"]
    rows = torch.arange(20.0).unsqueeze(1).expand(-1, 3)
    q, k, v = ([names[int(i)] for i in part[:, 0]] for part in split_grouped(rows, 3, 2))
    assert q == ["a0x", "a0y", "b0x", "b0y", "c0x", "c0y", "a1x", "a1y", "b1x", "b1y", "c1x", "c1y"]
    assert (k, v) == (["k0x", "k0y", "k1x", "k1y"], ["v0x", "v0y", "v1x", "v1y"])


def test_precision_is_kept_tensor_by_tensor(tmp_path):
    weights = write_folder(tmp_path / "source", small_config())
    kept = "vision_model.encoder.layers.0.ls1"
    halves = {name: tensor if name == kept else tensor.bfloat16() for name, tensor in weights.items()}
    write_weights(tmp_path / "source", halves)
    folder = convert(tmp_path / "source", tmp_path / "target").folder
    converted = load_file(folder / "model.safetensors")
    assert {name for name, tensor in converted.items() if tensor.dtype != torch.bfloat16} == {
        "vision_tower.encoder.layer.0.lambda_1"
    }
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(folder).dtype == torch.bfloat16


def test_files_are_no_larger_than_asked(tmp_path):
    config = small_config()
    weights = write_folder(tmp_path / "source", config)
    seen: list[tuple[int, int]] = []
    total = sum(tensor.nbytes for tensor in weights.values())
    done = convert(
        tmp_path / "source", tmp_path / "target", shard_bytes=60_000, progress=lambda *pair: seen.append(pair)
    )
    files = sorted(done.folder.glob("*.safetensors"))
    assert len(files) == done.files == len(seen) - 1 > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total == done.nbytes
    stored = {}
    for file in files:
        tensors = load_file(file)
        stored |= dict.fromkeys(tensors, file.name)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= 60_000 or len(sizes) == 1
    assert index["weight_map"] == stored
    modes = {file.stat().st_mode for file in done.folder.iterdir()}
    assert len(modes) == 1  # whoever may read the configuration may read the weights
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert_same_logits(done.folder, config, weights)


def test_memory_is_that_of_one_new_file(tmp_path):
    """600 MB in files of 100 MB: nothing is held but the new file and the memory-mapped file that is read."""
    size = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 4096}
    config = small_config(num_hidden_layers=17, **size)
    config["llm_config"]["vocab_size"] = original.write_tokenizer(tmp_path, INTERNLM2)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in original.shapes(config)}
    total = sum(tensor.nbytes for tensor in weights.values())
    assert total > 500 * 10**6
    write_folder(tmp_path / "source", config, weights, files=6)
    del weights
    process, peak, stop = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(tmp_path / "source", tmp_path / "target", shard_bytes=100 * 10**6)
    stop.set()
    watcher.join()
    assert peak - before < 300 * 10**6


@pytest.fixture
def source(tmp_path):
    write_folder(tmp_path / "source", small_config(), files=1)
    return tmp_path / "source"


def change_weights(source: Path, change: Any) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, change: Any) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def assert_refused(source: Path, message: str) -> None:
    target = source.parent / "target"
    with pytest.raises(ConversionError, match=message):
        convert(source, target)
    assert not target.exists()


WQKV = "language_model.model.layers.1.attention.wqkv.weight"


def test_a_missing_tensor_is_named(source):
    change_weights(source, lambda weights: weights.pop(WQKV))
    assert_refused(source, rf"source: tensor {WQKV} is missing; the folder is incomplete")


def test_a_surplus_tensor_is_named(source):
    change_weights(source, lambda weights: weights.update({"vision_model.extra": torch.zeros(1), "zz": torch.zeros(1)}))
    assert_refused(source, r"source: tensors vision_model\.extra and 1 more are not known")


def test_a_wrong_shape_is_named(source):
    change_weights(source, lambda weights: weights.update({WQKV: torch.zeros(81, 48)}))
    assert_refused(source, rf"model\.safetensors: tensor {WQKV} has shape \(81, 48\), config\.json says \(80, 48\)")


def test_a_tensor_in_two_files_is_named(source):
    weights = load_file(source / "model.safetensors")
    write_weights(source, weights, files=2)
    first, second = sorted(source.glob("model-*"))
    save_file(load_file(second) | {WQKV: weights[WQKV]}, second, metadata={"format": "pt"})
    save_file(load_file(first) | {WQKV: weights[WQKV]}, first, metadata={"format": "pt"})
    assert_refused(
        source, rf"model-00002-of-00002\.safetensors: tensor {WQKV} lies in model-00001-of-00002\.safetensors"
    )


def test_quantised_weights_are_refused(source):
    change_weights(source, lambda weights: weights.update({WQKV: torch.zeros(80, 48, dtype=torch.int8)}))
    assert_refused(source, rf"tensor {WQKV} is I8; only bfloat16, float16 and float32 are converted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "internvl"}, r"config\.json: model_type: 'internvl', not .*transformers' format already"),
        ({"model_type": "llama"}, r"config\.json: model_type: 'llama', not 'internvl_chat'; give the folder of"),
        ({"ps_version": "v1"}, r"ps_version: 'v1' has no counterpart .* only 'v2' is converted"),
        ({"select_layer": -4}, "select_layer: -4 has no counterpart"),
        ({"pad2square": True}, "pad2square: True has no counterpart"),
        ({"use_thumbnail": False}, "use_thumbnail: False has no counterpart"),
        ({"use_llm_lora": 16}, "use_llm_lora: 16: merge the LoRA"),
        ({"force_image_size": 112}, "force_image_size: 112, but the vision tower has positions for 56"),
        ({"template": "vicuna"}, r"template: 'vicuna' .* only 'internlm2-chat' or 'Hermes-2' or 'phi3-chat'"),
        ({"vision_config": None}, "vision_config: missing; take the config.json"),
        ({"llm_config": 5}, "llm_config: must be a group of fields, found 5"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_converted_is_named(source, change, message):
    change_json(source / "config.json", lambda values: values.update(change))
    assert_refused(source, message)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("llm_config", {"architectures": ["Gemma2ForCausalLM"]}, r"llm_config\.architectures: language tower 'Gemma2"),
        ("llm_config", {"hidden_size": None}, r"llm_config\.hidden_size: missing"),
        ("llm_config", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"llm_config\.rope_scaling: 'yarn' is not"),
        ("llm_config", {"vocab_size": 100}, r"llm_config\.vocab_size: 100, but the tokenizer has \d+ tokens"),
        ("vision_config", {"norm_type": "batch_norm"}, r"vision_config\.norm_type: 'batch_norm' has no counterpart"),
        ("vision_config", {"qk_normalization": True, "layer_norm_eps": 1e-5}, r"vision_config\.layer_norm_eps: 1e-05"),
    ],
)  # fmt: skip
def test_a_group_that_cannot_be_converted_is_named(source, group, change, message):
    change_json(source / "config.json", lambda values: values[group].update(change))
    assert_refused(source, message)


def test_attention_within_a_window_is_refused(tmp_path):
    write_folder(tmp_path / "source", small_config(PHI3, sliding_window=32))
    assert_refused(tmp_path / "source", r"llm_config\.sliding_window: 32: attention within a window")


def test_folders_that_are_none_are_named(source, tmp_path):
    assert_refused(tmp_path / "nothing", "nothing: no such folder; download the model first")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", r"empty/config\.json: missing; the folder must be complete")
    (source / "config.json").write_text("{")
    assert_refused(source, r"config\.json: not valid JSON")
    (source / "config.json").write_text("[]")
    assert_refused(source, r"config\.json: must hold an object, found list")


def test_weights_that_are_not_there_are_named(source):
    file = source / "model.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2])
    assert_refused(source, r"model\.safetensors: not a complete safetensors file .* Git LFS pointer")
    write_weights(source, {"a": torch.zeros(1), "b": torch.zeros(1)}, files=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    assert_refused(source, r"index\.json: names model-00002-of-00002\.safetensors, which the folder does not hold")
    (source / "model.safetensors.index.json").unlink()
    file.unlink()
    assert_refused(source, r"source: no weights; expected model\.safetensors")


class Trap:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_a_pickle_is_never_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": Trap()}, source / "pytorch_model.bin")
    assert_refused(source, r"pytorch_model\.bin: it holds more than tensors")
    assert not Path("sprung").exists()
    torch.save([torch.zeros(1)], source / "pytorch_model.bin")
    assert_refused(source, r"pytorch_model\.bin: not a mapping of names to tensors")
    (source / "pytorch_model.bin").write_bytes(b"nothing")
    assert_refused(source, r"pytorch_model\.bin: cannot be read")


def test_a_tokenizer_that_does_not_fit_is_named(source):
    settings = source / "tokenizer_config.json"
    change_json(
        settings,
        lambda values: values["added_tokens_decoder"].pop(str(max(map(int, values["added_tokens_decoder"])) - 1)),
    )
    change_json(source / "added_tokens.json", lambda values: values.pop("<box>"))
    assert_refused(
        source, r"tokenizer_config\.json: added token '</box>' is to be number \d+, but the vocabulary makes it"
    )
    change_json(settings, lambda values: values["added_tokens_decoder"].clear())
    change_json(source / "added_tokens.json", lambda values: values.clear())
    assert_refused(source, r"tokenizer_config\.json: no token '<img>'; is it InternVL2's\?")
    (source / "tokenizer.model").write_bytes(b"\xff\xff")
    assert_refused(source, r"tokenizer\.model: not a sentencepiece model")
    model = original.sentencepiece_model()
    model.trainer_spec.model_type = 1
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    assert_refused(source, r"tokenizer\.model: a sentencepiece model, but not of BPE")
    (source / "tokenizer.model").unlink()
    assert_refused(source, r"source: no tokenizer\.json, no tokenizer\.model")


def test_a_folder_with_anything_in_it_is_replaced_only_when_told(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    convert(source, target)  # an empty one is as good as none
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"target: not empty; name another folder, or replace it with --force"):
        convert(source, target)
    assert (target / "notes.txt").exists()
    convert(source, target, force=True)
    assert not (target / "notes.txt").exists()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("target")] == ["target"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file: a file; name a folder"):
        convert(source, tmp_path / "file", force=True)


def test_the_original_folder_is_never_overwritten(source):
    for target in (source, source / ".." / "source", source.parent):
        with pytest.raises(ConversionError, match="holds the original folder"):
            convert(source, target, force=True)
    assert (source / "model.safetensors").exists()


def test_a_conversion_that_broke_off_is_started_anew(source, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("still here")
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, force=True, progress=interrupt)
    assert (target / "old.txt").exists()
    load(convert(source, target, force=True).folder)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("target")) == ["target"]


def test_a_full_disk_is_noticed_before_anything_is_written(source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    assert_refused(source, "GB are to be written, 0.0 GB are free there; make room")
