import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from pipeline.config import BaseModelConfig
from pipeline.data.demo.abilities import vocabulary
from pipeline.models.bases import load_processor
from pipeline.models.processors import ImageTextProcessor
from pipeline.models.tiny import CHAT_TEMPLATE, tiny_config, tiny_processor, tiny_tokenizer
from tests.helpers import ask


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(vocabulary())


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 50, 3), dtype=np.uint8))


TEXT = "<|user|><IMG_CONTEXT>what color is <IMG_CONTEXT> qz7?<|assistant|>"


def assert_same_inputs(one, other, image):
    first, second = (p(images=[image, image], text=[TEXT], return_tensors="np") for p in (one, other))
    assert first.keys() == second.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all((first[key] == second[key]).all() for key in first)


def checkpoint_of(processor, folder):
    """Writes a checkpoint folder as far as a processor looks at one."""
    processor.save_pretrained(folder)
    tiny_config(processor).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return BaseModelConfig(path=str(folder))


def test_a_saved_processor_gives_the_same_inputs(processor, image, tmp_path):
    loaded = load_processor(checkpoint_of(processor, tmp_path))
    assert_same_inputs(processor, loaded, image)
    assert loaded.image_seq_length == processor.image_seq_length == 16
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.padding_side == "left"
    assert_same_inputs(processor, load_processor(checkpoint_of(loaded, tmp_path / "again")), image)


def test_the_older_layout_of_folders_loads_as_well(processor, image, tmp_path):
    """`preprocessor_config.json` for the images, `processor_config.json` for the rest, as InternVL's folders have."""
    config = checkpoint_of(processor, tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": 16})
    )
    processor.image_processor.save_pretrained(tmp_path / "images")
    shutil.copy(tmp_path / "images" / "preprocessor_config.json", tmp_path)
    assert_same_inputs(processor, load_processor(config), image)


def test_an_image_is_start_context_and_end_tokens(processor, image):
    inputs = processor(images=[image], text=["red<IMG_CONTEXT>blue"], return_tensors="np")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["red", "<img>", *["<IMG_CONTEXT>"] * 16, "</img>", "blue"]
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)


def test_pixels_are_scaled_to_one_around_zero(processor):
    pixels = [processor(images=[Image.new("RGB", (64, 64), c)], text=["<IMG_CONTEXT>"]) for c in ("black", "white")]
    assert [np.unique(p["pixel_values"]).tolist() for p in pixels] == [[-1], [1]]


def test_tiles_of_a_large_image_get_their_tokens(image):
    tiling = ImageTextProcessor(
        GotOcr2ImageProcessorPil(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ),
        tiny_tokenizer(vocabulary()),
        image_seq_length=4,
    )  # fmt: skip
    wide = Image.new("RGB", (128, 32))
    inputs = tiling(images=[wide, Image.new("RGB", (32, 32))], text=["<IMG_CONTEXT>or<IMG_CONTEXT>"])
    tiles = len(inputs["pixel_values"])
    assert tiles == 4 + 1 + 1  # four crops and the thumbnail; one
    assert (np.asarray(inputs["input_ids"]) == tiling.image_token_id).sum() == 4 * tiles


TILES = {(448, 448): 1, (100, 100): 1, (900, 440): 3, (1344, 896): 7, (4480, 448): 11, (50, 900): 13, (3000, 4000): 13}
"""Tiles of an image of this width and height, its thumbnail among them, where at most twelve are allowed."""


@pytest.mark.parametrize(("size", "tiles"), TILES.items())
def test_internvl_tiles_as_published(size, tiles):
    """1 to 12 tiles of 448 by the nearest aspect ratio, and a thumbnail where there are several; 256 tokens each."""
    images = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    processor = ImageTextProcessor(
        images, tiny_tokenizer(vocabulary()), image_seq_length=256, chat_template=CHAT_TEMPLATE
    )
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    row = ask(processor, "what ?", image)
    assert len(row.images["pixel_values"]) == tiles
    assert (row.input_ids == processor.image_token_id).sum() == 256 * tiles
    expected = images(images=[image], return_tensors="np")["pixel_values"]
    assert (row.images["pixel_values"] == expected).all()


def test_text_alone_has_no_pixels(processor):
    inputs = processor(images=None, text=["<|user|>red<|assistant|>"], return_tensors="np")
    assert "pixel_values" not in inputs
    assert inputs["input_ids"].shape == (1, 3)
