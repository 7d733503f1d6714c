"""Conversations with a converted base: its tokens, its chat template, its images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.processing_utils import VideosKwargs

from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base, load_processor
from pipeline.models.encoding import IGNORED, chat, encode
from pipeline.models.generation import generate_answers
from pipeline.models.internvl2 import ConversionError, convert
from pipeline.models.internvl2.chat import SYSTEM_MESSAGE
from tests.models import original
from tests.models.original import small_config, write_folder

INTERNLM2, QWEN2, PHI3, LLAMA = "InternLM2ForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "LlamaForCausalLM"


@pytest.fixture(scope="module", params=[INTERNLM2, QWEN2, PHI3])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder / "source", small_config(request.param))
    return load_base(BaseModelConfig(path=str(convert(folder / "source", folder / "target").folder)))


def language_class_of(base: Any) -> str:
    return base.folder.parent.name.rstrip("0123456789")


def test_a_converted_folder_is_a_base_that_answers(base):
    tokenizer = base.processor.tokenizer
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token == ("<|end|>" if language_class_of(base) == PHI3 else "<|im_end|>")
    assert tokenizer.pad_token == ("<|endoftext|>" if language_class_of(base) == QWEN2 else "</s>")
    assert base.model.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert base.model.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    assert 2 in base.model.generation_config.eos_token_id
    assert base.model.generation_config.pad_token_id == tokenizer.pad_token_id
    image = Image.new("RGB", (130, 60), "red")
    rows = [
        encode(
            base.processor,
            [{"role": "user", "content": text}, {"role": "assistant", "content": ""}],
            images,
            answer=False,
        )
        for text, images in (("<image>what color is this", [image]), ("the star", []))
    ]
    assert len(generate_answers(base.model, base.processor, rows, max_new_tokens=2)) == 2


def test_a_training_row_is_the_original_conversation(base):
    """The text of the original conversation, with its tokens; the answer and the end of its message are learned."""
    image = Image.new("RGB", (56, 56), "blue")
    messages = [
        {"role": "user", "content": "<image>what color is this"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "the star"},
        {"role": "assistant", "content": "red"},
    ]
    row = encode(base.processor, messages, [image])
    phi3 = language_class_of(base) == PHI3
    # Phi-3's tokens that open a message take the line break with them.
    start, end = ("<|{}|>", "<|end|>") if phi3 else ("<|im_start|>{}\n", "<|im_end|>")
    system = (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    )
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n"
    text = {QWEN2: "", INTERNLM2: "<s>", PHI3: "<s> "}[language_class_of(base)]
    for role, content in (
        ("system", system),
        ("user", f"{image}what color is this"),
        ("assistant", "blue"),
        ("user", "the star"),
        ("assistant", "red"),
    ):
        text += start.format(role) + content + end
    assert base.processor.tokenizer.decode(row.input_ids) == text
    learned = row.labels != IGNORED
    assert base.processor.tokenizer.decode(row.labels[learned]) == f"red{end}"
    assert learned.nonzero()[0][0] == len(row.input_ids) - learned.sum()
    assert base.processor.tokenizer.decode(row.input_ids, skip_special_tokens=True).endswith("red")


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nwhat color is this",
        "Image-1: <image>\nImage-2: <image>\nwhat is the color",
        "is <image> red, or  <image>",
        "the star <image>\n\nis it red",
    ],
)
def test_white_space_beside_images_is_that_of_the_question(base, question):
    """As the original code, which puts an image's tokens into the question in the place of `<image>`."""
    count = question.count("<image>")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    row = encode(base.processor, messages, [Image.new("RGB", (56, 56))] * count, answer=False)
    text = base.processor.tokenizer.decode(row.input_ids)
    start = "<|user|>" if language_class_of(base) == PHI3 else "<|im_start|>user\n"
    expected = question.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 4 + "</img>")
    assert text.split(start)[1].split("<|end|>")[0].split("<|im_end|>")[0] == expected


def test_transformers_own_processor_loads_the_folder_too(base, monkeypatch):
    """As vLLM does; its video half needs torchvision, so what it would read is checked instead."""
    saved = json.loads((base.folder / "processor_config.json").read_text())
    frames = saved["video_processor"]
    assert frames.pop("video_processor_type") == "InternVLVideoProcessor"
    assert set(frames) <= set(VideosKwargs.__annotations__)
    assert frames == {name: saved["image_processor"][name] for name in frames}
    assert set(frames) >= {"size", "image_mean", "image_std", "rescale_factor"}
    names = [
        saved["processor_class"],
        json.loads((base.folder / "tokenizer_config.json").read_text())["processor_class"],
    ]
    assert names == ["InternVLProcessor", "InternVLProcessor"]
    monkeypatch.setattr(InternVLProcessor, "get_attributes", staticmethod(lambda: ["image_processor", "tokenizer"]))
    for loader in (AutoProcessor, InternVLProcessor):
        stock = loader.from_pretrained(base.folder)
        assert type(stock) is InternVLProcessor
        assert len(stock.tokenizer) == len(base.processor.tokenizer) <= base.model.config.text_config.vocab_size
        conversation = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is this"}]},
        ]
        images = [Image.effect_noise((130, 60), 60).convert("RGB")]
        one, other = (
            processor(
                images=images,
                text=[processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)],
                return_tensors="np",
            )
            for processor in (stock, base.processor)
        )
        for name in ("input_ids", "pixel_values"):
            np.testing.assert_array_equal(one[name], other[name])


def test_the_system_message_is_that_of_the_original_configuration(tmp_path):
    system = "You are 'InternVL', and you read \"all\" {{ images }}.\nAlways."
    for name, message, expected in (("own", system, system), ("empty", "", ""), ("null", None, SYSTEM_MESSAGE)):
        write_folder(tmp_path / name, small_config() | {"system_message": message})
        tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / name, tmp_path / f"new-{name}").folder)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
        assert text == f"<s><|im_start|>system\n{expected}<|im_end|><|im_start|>user\nthe<|im_end|>"
    write_folder(tmp_path / "number", small_config() | {"system_message": 5})
    with pytest.raises(ConversionError, match=r"config\.json: system_message: must be text, found 5"):
        convert(tmp_path / "number", tmp_path / "new")


def test_a_system_message_of_ones_own_takes_the_place_of_the_original_one(base):
    messages = [{"role": "system", "content": "read"}, {"role": "user", "content": "the star"}]
    text = base.processor.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in messages], tokenize=False, add_generation_prompt=True
    )
    assert "InternVL" not in text
    assert text.index("read") < text.index("the star") < text.index("assistant")


def test_images_are_cut_into_tiles_with_a_thumbnail(base):
    inputs = base.processor(images=[Image.new("RGB", (300, 200))], text=["<IMG_CONTEXT>"], return_tensors="np")
    assert base.processor.image_processor.crop_to_patches
    tiles = len(inputs["pixel_values"])
    assert tiles == 7  # three by two, and the whole
    assert (inputs["input_ids"] == base.processor.image_token_id).sum() == 4 * tiles
    (black,) = base.processor(images=[Image.new("RGB", (56, 56))], text=["<IMG_CONTEXT>"])["pixel_values"]
    np.testing.assert_allclose(black[:, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)


TEXTS = [
    "the color is red.",
    "what  is\nthe  blue\n\nstar",
    "thethe",
    "image of a Ünïcode 星 user",
    " the",
    "",
    "statarstar",
    "a\tb",
]


@pytest.mark.parametrize("text", TEXTS)
def test_internlm2_tokens_are_those_of_sentencepiece(tmp_path_factory, text):
    tokenizer = converted_tokenizer(tmp_path_factory, INTERNLM2)
    model = original.sentencepiece_model()
    assert tokenizer(text)["input_ids"] == original.sentencepiece_encode(model, text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{name}|>") for name in ("start", "end"))
    between = original.sentencepiece_encode(model, text)
    assert tokenizer(f"<|im_start|>{text}<|im_end|>")["input_ids"] == [start, *between, end]


def test_added_tokens_keep_their_numbers(tmp_path_factory):
    """InternLM2's last unused pieces make room for them; image tokens follow after the vocabulary."""
    tokenizer = converted_tokenizer(tmp_path_factory, INTERNLM2)
    pieces = len(original.sentencepiece_model().pieces)
    words = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    assert tokenizer.convert_tokens_to_ids(words) == list(range(pieces - 2, pieces + 3))
    assert len(tokenizer) == pieces + len(original.IMAGE_WORDS)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.context_image_token_id == pieces + 2


def test_phi3_puts_no_space_behind_special_tokens(tmp_path_factory):
    """As published: only a text without any special token would begin with a space, and no conversation does."""
    tokenizer = converted_tokenizer(tmp_path_factory, PHI3)
    model = original.sentencepiece_model(0)
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    words = original.sentencepiece_encode(model, "the star")
    assert tokenizer("<|user|>\nthe star<|end|>")["input_ids"] == [user, *words, end]


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({}, ["<s>", "▁", "<|system|>"]),
        ({"additional_special_tokens": ["<img>", "<|system|>"]}, ["<s>", "<|system|>"]),
        ({"additional_special_tokens": [{"content": "<|system|>"}]}, ["<s>", "<|system|>"]),
        ({"add_prefix_space": False}, ["<s>", "<|system|>"]),
        ({"legacy": True}, ["<s>", "<|system|>"]),
        ({"add_bos_token": False}, ["▁", "<|system|>"]),
    ],
)
def test_phi3_puts_a_space_before_its_first_token(tmp_path, settings, pieces):
    """Llama's tokenizer takes that space away again only before tokens that it knows as special."""
    write_folder(tmp_path / "source", small_config(PHI3))
    file = tmp_path / "source" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "source", tmp_path / "target").folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt[: len(pieces)]) == pieces


def test_an_older_llama_tokenizer_puts_a_space_before_every_text(tmp_path):
    write_folder(tmp_path / "source", small_config(PHI3))
    file = tmp_path / "source" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["legacy"]
    file.write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "source", tmp_path / "target").folder)
    words = original.sentencepiece_encode(original.sentencepiece_model(0, prefix=True), "the star")
    assert tokenizer("<|user|>\nthe star")["input_ids"][1:] == words
    assert tokenizer.decode(words) == "the star"


def test_qwen2_tokens_are_those_of_its_own_tokenizer(tmp_path_factory):
    tokenizer = converted_tokenizer(tmp_path_factory, QWEN2)
    files = {"vocab": tokenizer.source / "vocab.json", "merges": tokenizer.source / "merges.txt"}
    reference = Qwen2Tokenizer(**{name: str(file) for name, file in files.items()})
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token is None
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == len(json.loads(files["vocab"].read_text())) + 2


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path, tmp_path_factory):
    """As the 76B has; whether texts begin with a token is what its post-processor does."""
    write_folder(tmp_path / "source", small_config())
    ready = converted_tokenizer(tmp_path_factory, INTERNLM2)
    ready.add_bos_token = True
    ready.save_pretrained(tmp_path / "ready")
    shutil.copy(tmp_path / "ready" / "tokenizer.json", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").unlink()
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "source", tmp_path / "target").folder)
    ready.add_bos_token = False
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ready(text)["input_ids"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])["input_ids"]
    assert prompt[:2] == [1, tokenizer.convert_tokens_to_ids("<|im_start|>")]


SIZES = {
    "1B": (QWEN2, original.VISION_300M, "Hermes-2"),
    "2B": (INTERNLM2, original.VISION_300M, "internlm2-chat"),
    "4B": (PHI3, original.VISION_300M, "phi3-chat"),
    "8B": (INTERNLM2, original.VISION_300M, "internlm2-chat"),
    "26B": (INTERNLM2, original.VISION_6B, "internlm2-chat"),
    "40B": (LLAMA, original.VISION_6B, "Hermes-2"),
    "76B": (LLAMA, original.VISION_6B, "internlm2-chat"),
}
"""Language tower, vision tower and conversation by original size."""


def write_size(size: str, folder: Path) -> None:
    """Writes a small model laid out as InternVL2 of a size is: its towers, conversation and kind of tokenizer files."""
    language_class, tower, template = SIZES[size]
    write_folder(folder, small_config(language_class, tower) | {"template": template})
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if size == "40B":  # Yi's, of sentencepiece too, which starts texts with nothing
        del settings["auto_map"]
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": True}
    elif size == "76B":  # Llama 3's, of the tokenizers library
        ready = convert(folder, folder.with_name("ready")).folder
        del settings["auto_map"]
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        shutil.copy(ready / "tokenizer.json", folder)
        (folder / "tokenizer.model").unlink()
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("size", SIZES)
def test_processors_of_all_sizes_load_and_encode(size, tmp_path, monkeypatch):
    write_size(size, tmp_path / "source")
    folder = convert(tmp_path / "source", tmp_path / "target").folder
    processor = load_processor(BaseModelConfig(path=str(folder)))
    messages = [{"role": "user", "content": "<image>\nwhat is the color"}, {"role": "assistant", "content": "red"}]
    image = Image.effect_noise((130, 60), 60).convert("RGB")
    row = encode(processor, messages, [image])
    pieces = processor.tokenizer.convert_ids_to_tokens(row.input_ids)
    tiles = len(row.images["pixel_values"])
    assert pieces.count("<IMG_CONTEXT>") == 4 * tiles == 12
    assert pieces[-1] == processor.tokenizer.eos_token
    assert not processor.tokenizer.unk_token or processor.tokenizer.unk_token not in pieces
    assert max(row.input_ids) < json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    start = {"1B": ["<|im_start|>"], "40B": ["<|im_start|>"], "4B": ["<s>", "▁", "<|system|>"]}
    expected = start.get(size, ["<|im_start|>"] if size == "76B" else ["<s>", "<|im_start|>"])
    assert pieces[: len(expected)] == expected
    monkeypatch.setattr(InternVLProcessor, "get_attributes", staticmethod(lambda: ["image_processor", "tokenizer"]))
    stock = AutoProcessor.from_pretrained(folder)
    prompt = stock.apply_chat_template(chat(messages[:1]), add_generation_prompt=True, tokenize=False)
    inputs = stock(images=[image], text=[prompt], return_tensors="np")
    np.testing.assert_array_equal(inputs["input_ids"][0], row.input_ids[: inputs["input_ids"].shape[1]])
    np.testing.assert_array_equal(inputs["pixel_values"], row.images["pixel_values"])


_tokenizers: dict[str, Any] = {}


def converted_tokenizer(factory: pytest.TempPathFactory, language_class: str) -> Any:
    """Returns the converted tokenizer of a small model; `source` is where the original one lies."""
    if language_class not in _tokenizers:
        folder = factory.mktemp("tokenizer")
        write_folder(folder / "source", small_config(language_class))
        _tokenizers[language_class] = AutoTokenizer.from_pretrained(
            convert(folder / "source", folder / "target").folder
        )
        _tokenizers[language_class].source = folder / "source"
    return _tokenizers[language_class]
