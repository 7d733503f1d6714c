"""Processor files of a base as transformers' own `AutoProcessor` loads them, without this project.

A checkpoint's files name stock classes already (`processors`). What a stock class needs and a base for images only may lack is
added: InternVL's asks the tokenizer for a video token. Stock classes with a video processor also need torchvision.
"""

import json
from pathlib import Path

from pipeline.files import write_json

PROCESSOR_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
)  # fmt: skip
"""Files of a checkpoint that processors and configurations are loaded from; no weights."""

WITH_VIDEO = ("InternVLProcessor", "Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "SmolVLMProcessor")
"""Stock processors that have a video processor, which transformers imports torchvision for."""


def complete_processor(folder: Path) -> str | None:
    """Adds to a folder with copies of a base's processor files what the stock class asks for; returns the name of that class.

    None where the files name no class: a tokenizer alone, for bases that read text only.
    """
    name = processor_class(folder)
    file = folder / "tokenizer_config.json"
    if name == "InternVLProcessor" and file.is_file():
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        if "video_token" not in tokenizer and "video_token" not in (tokenizer.get("extra_special_tokens") or ()):
            # Any token but the image's will do, and one of the vocabulary leaves the vocabulary as it is.
            write_json(file, tokenizer | {"video_token": tokenizer.get("unk_token") or tokenizer["pad_token"]})
    return name


def processor_class(folder: Path) -> str | None:
    """Returns the stock class that the processor files in a folder name."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file() and (found := json.loads(file.read_text(encoding="utf-8")).get("processor_class")):
            return str(found)
    return None
