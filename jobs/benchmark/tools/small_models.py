"""Small random checkpoints of every family of bases, as folders that stock transformers writes; none needs a download.

- Each is the family's own model class with its own image processor, two layers deep and 64 wide, over the tokenizer of the
  demo's base: what differs between families (tiles, grids, marks, where the parts sit) is there, what costs time is not.
- A builder returns model and processor; `write_small` writes them, always the same, as a checkpoint folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from pipeline.data.demo.abilities import vocabulary
from pipeline.models import processors
from pipeline.models.processors import TextProcessor
from pipeline.models.tiny import tiny_config, tiny_processor, tiny_tokenizer

Built = tuple[Any, Any]
"""Model and processor."""

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2,
}  # fmt: skip
"""Sizes of the language models; weights large enough that prompts differ visibly in the logits."""

QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDEFICS = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
"""Special tokens of the families."""


def _template(image: str) -> str:
    """Returns a chat template that writes `image` for an image."""
    return (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + image + "{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def _tokenizer(chat_template: str, *special: str) -> PreTrainedTokenizerFast:
    """Returns the demo's base's tokenizer with further special tokens and another chat template."""
    tokenizer = tiny_tokenizer(vocabulary())
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Returns the configuration of a language model for a tokenizer."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    return {**TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, **tokens, **more}


def internvl() -> Built:
    """Returns an InternVL that cuts images into up to four tiles, over a Llama."""
    processor = tiny_processor(vocabulary())
    processor.image_processor.crop_to_patches = True
    processor.image_processor.max_patches = 4
    config = tiny_config(processor, width=64, layers=2)
    config.text_config = LlamaConfig(**_text(processor.tokenizer))
    return InternVLForConditionalGeneration(config), processor


def llava() -> Built:
    """Returns a LLaVA 1.5: CLIP tower, its last layer but one, no class token."""
    tokenizer = _tokenizer(_template("<image>"), "<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = processors.LlavaImageTextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _qwen(model: Any, config: Any, processor: Any, vision: dict[str, Any], rope: dict[str, Any], **text: Any) -> Built:
    """Returns a Qwen-VL: its tower's settings, how its positions rotate, what its text model has of its own."""
    tokenizer = _tokenizer(_template(f"{QWEN[0]}<|image_pad|>{QWEN[1]}"), *QWEN)
    patch = vision["patch_size"]
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 16 * patch * patch, "longest_edge": 64 * patch * patch}, patch_size=patch
    )
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, **rope}
    settings = config(
        vision_config={"depth": 2, "num_heads": 2, "initializer_range": 0.2, **vision},
        text_config=_text(tokenizer, rope_parameters=rope, **text),
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(QWEN)), strict=True)),
    )
    return model(settings), processor(images, tokenizer, chat_template=tokenizer.chat_template)


def qwen2_vl() -> Built:
    """Returns a Qwen2-VL."""
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14}
    kinds = Qwen2VLForConditionalGeneration, Qwen2VLConfig, processors.Qwen2ImageTextProcessor
    return _qwen(*kinds, vision, {})


def qwen2_5_vl() -> Built:
    """Returns a Qwen2.5-VL."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "fullatt_block_indexes": [1], "patch_size": 14,
    }  # fmt: skip
    kinds = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, processors.Qwen2ImageTextProcessor
    return _qwen(*kinds, vision, {})


def qwen3_vl() -> Built:
    """Returns a Qwen3-VL."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64, "patch_size": 16,
    }  # fmt: skip
    kinds = Qwen3VLForConditionalGeneration, Qwen3VLConfig, processors.Qwen3ImageTextProcessor
    return _qwen(*kinds, vision, {"mrope_interleaved": True}, head_dim=16)


def _idefics(model: Any, config: Any, images: Any, processor: Any) -> Built:
    tile_tokens = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    tokenizer = _tokenizer(_template("<image>"), *IDEFICS, *tile_tokens)
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    settings = config(
        vision_config=vision,
        text_config=LlamaConfig(**_text(tokenizer)).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    sizes = images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return model(settings), processor(sizes, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)


def idefics3() -> Built:
    """Returns an Idefics3 that cuts images into four tiles and a global view."""
    kinds = Idefics3ForConditionalGeneration, Idefics3Config, Idefics3ImageProcessorPil
    return _idefics(*kinds, processors.Idefics3ImageTextProcessor)


def smolvlm() -> Built:
    """Returns a SmolVLM of the same sizes."""
    kinds = SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMImageProcessorPil
    return _idefics(*kinds, processors.SmolVLMImageTextProcessor)


def text() -> Built:
    """Returns a Llama that reads text only."""
    tokenizer = _tokenizer(_template(""))
    return LlamaForCausalLM(LlamaConfig(**_text(tokenizer))), TextProcessor(tokenizer)


SMALL: dict[str, Callable[[], Built]] = {
    builder.__name__: builder for builder in (internvl, llava, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, text)
}
"""Builders by family."""


def write_small(name: str, folder: Path) -> Path:
    """Writes the small checkpoint of a family, always the same, and returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = SMALL[name]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
