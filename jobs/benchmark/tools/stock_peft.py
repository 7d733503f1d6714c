"""Answers prompts with an exported expert in an environment that holds torch, transformers, peft, pillow and torchvision alone.

    python stock_peft.py <base folder> <expert folder> <processor folder> prompts.json answers.json

The same lines as in an expert's README.md. Nothing of the project is imported, or there to be imported.
"""

import base64
import importlib.util
import io
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

TOKENS = 8
"""Most tokens of an answer."""


@torch.inference_mode()
def main(base: str, expert: str, processor_folder: str, prompts: str, answers: str) -> None:
    """Writes answers, and the logits of each answer's first token, to the file `answers`."""
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), expert).eval()
    processor = AutoProcessor.from_pretrained(processor_folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(processor_folder, backend="pil")
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
