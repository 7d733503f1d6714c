"""The demo's base: a real InternVL of 1.5 million parameters that ships with the project.

Architecture, tokenizer and processor; the pretrained weights lie in `tiny_base/`. Those of another one, which has learned
operations on written and on printed sequences, lie in `operations_base/`; `jobs.pretrain_tiny` makes such bases. It reads 64x64
images in 8x8 patches (16 image tokens after pixel shuffle) and a small English vocabulary; every other word is spelled in
single characters, so any ASCII text can be tokenized.
"""

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from pipeline.models.processors import ImageTextProcessor

TINY_BASE = Path(__file__).parent / "tiny_base"
"""Folder of the shipped weights, loadable like any other checkpoint folder."""

OPERATIONS_BASE = Path(__file__).parent / "operations_base"
"""The same of the one that knows operations: for what is learned in one modality and asked for in the other."""

IMAGE_SIZE = 64
"""Side of the image tile, in pixels."""

INITIALIZER_RANGE = 0.06
"""Standard deviation of the initial weights: the 0.02 of large models is too small at width 128 and learns far slower."""

SPECIAL_TOKENS = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds the word-level tokenizer: `words` are one token each, WordPiece spells all others in characters."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*SPECIAL_TOKENS, *IMAGE_TOKENS.values(), *characters, *(f"##{c}" for c in characters)]
    pieces += [word for word in dict.fromkeys(words) if word not in set(pieces)]
    numbers = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="<unk>", max_input_chars_per_word=1 << 20))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *IMAGE_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        padding_side="left",
        extra_special_tokens=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_processor(words: Iterable[str]) -> ImageTextProcessor:
    """Builds the processor of the tiny base: 64x64 RGB, one tile per image, 16 image tokens per tile."""
    images = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        max_patches=1,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return ImageTextProcessor(
        image_processor=images, tokenizer=tiny_tokenizer(words), image_seq_length=16, chat_template=CHAT_TEMPLATE
    )


def tiny_config(
    processor: ImageTextProcessor, *, vision_width: int = 128, vision_layers: int = 3, width: int = 128, layers: int = 4
) -> InternVLConfig:
    """Returns the architecture for a processor's vocabulary; widths in features, `layers` of the language model."""
    tokenizer = processor.tokenizer
    vision = InternVLVisionConfig(
        hidden_size=vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        intermediate_size=3 * vision_width,
        image_size=IMAGE_SIZE,
        patch_size=8,
        attention_bias=True,
        initializer_range=INITIALIZER_RANGE,
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=processor.image_token_id,
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=True,
    )


def build_tiny(processor: ImageTextProcessor, **widths: int) -> InternVLForConditionalGeneration:
    """Returns an untrained tiny InternVL for `processor`; `widths` as in `tiny_config`."""
    config = tiny_config(processor, **widths)
    config._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model
