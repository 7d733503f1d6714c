"""Answers prompts with an exported expert in an environment that holds torch, transformers, peft and pillow alone.

    python stock_peft.py <base folder> <expert folder> <processor folder> prompts.json answers.json

The same lines as in an expert's README.md: with `AutoProcessor` where torchvision is there, which InternVL's takes, otherwise
with the tokenizer and the image processor. Nothing of the project is imported, or there to be imported.
"""

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

TOKENS = 8
"""Most tokens of an answer."""


class WithoutVideo:
    """InternVL's tokenizer and image processor, where its processor cannot be loaded."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._tokens = json.loads(Path(folder, "processor_config.json").read_text())["image_seq_length"]
        self.apply_chat_template, self.batch_decode = self.tokenizer.apply_chat_template, self.tokenizer.batch_decode

    def __call__(self, images: list[Image.Image] | None, text: list[str], return_tensors: str) -> dict[str, Any]:
        """Returns inputs for one prompt; every context token of the text becomes an image's tokens."""
        arrays = dict(self.image_processor(images, return_tensors=return_tensors)) if images else {}
        start, context, end = (getattr(self.tokenizer, f"{name}_image_token") for name in ("start", "context", "end"))
        pieces = text[0].split(context)
        counts = [f"{start}{context * (self._tokens * int(tiles))}{end}" for tiles in arrays.pop("num_patches", [])]
        whole = "".join(part for pair in zip(pieces, [*counts, ""], strict=True) for part in pair)
        return {**self.tokenizer([whole], return_tensors=return_tensors), **arrays}


def processor_at(folder: str) -> Any:
    """Returns the stock processor of a folder."""
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError:  # torchvision
        return WithoutVideo(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


@torch.inference_mode()
def main(base: str, expert: str, processor_folder: str, prompts: str, answers: str) -> None:
    """Writes answers, and the logits of each answer's first token, to the file `answers`."""
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), expert).eval()
    processor = processor_at(processor_folder)
    texts, logits = [], []
    for row in json.loads(Path(prompts).read_text()):
        images = [Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")] if row["image"] else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": row["prompt"]}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=images or None, text=[chat], return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
        logits.append(output.logits[0][0].tolist())
    found = {
        "answers": texts,
        "logits": logits,
        "processor": type(processor).__name__,
        "project_importable": any(importlib.util.find_spec(name) for name in ("pipeline", "jobs")),
    }
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
