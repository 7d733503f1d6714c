"""A base's processor: images and text in, model inputs out.

`ImageTextProcessor` is transformers' `InternVLProcessor` without the video half: the stock class insists on a video
processor, which insists on torchvision, which none of our work needs. Saved folders load with `load_processor`.
"""

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin


class ImageTextProcessor(InternVLProcessor):
    """InternVL's processor for images and text only.

    Every `<IMG_CONTEXT>` in the text is replaced by one image: start token, `image_seq_length` context tokens for each
    of its tiles, end token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        # InternVLProcessor.__init__ is left out on purpose: it wires up the video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names the parts that are saved and loaded: no video processor among them."""
        return ["image_processor", "tokenizer"]


def load_processor(folder: str | Path, *, trust_remote_code: bool = False) -> ImageTextProcessor:
    """Loads the processor of an InternVL folder (`processor_config.json` or `preprocessor_config.json` + tokenizer)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    images = GotOcr2ImageProcessorPil.from_pretrained(folder)
    settings, _ = ImageTextProcessor.get_processor_dict(str(folder))
    return ImageTextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_length=settings.get("image_seq_length", 256),
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )
