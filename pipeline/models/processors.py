"""Processors of bases: images and text in, model inputs out; one rule per family, none of which needs torchvision.

- Each is transformers' own processor without video: the stock classes require a video processor, which requires torchvision.
  Images go through the PIL versions of transformers' image processors, so results do not depend on installed packages.
- They save the same files as transformers' own processors, so that those can load them.
- `layout` says how the arrays of several rows make a batch.
- `families` maps families to rules; `bases.load_processor` loads folders.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.processing_utils import ProcessorMixin


@dataclass(frozen=True)
class BatchLayout:
    """Layout of the images in a batch."""

    row_axis: bool = False
    """Whether pixel arrays have an axis of rows before that of images; all images of a batch then form one row."""
    image_embeds: Literal["tensor", "list"] = "tensor"
    """Type in which the forward pass takes cached image embeddings."""


class _ImagesAndText(ProcessorMixin):
    """Base class: an image processor and a tokenizer, no video processor."""

    layout = BatchLayout()

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Returns the names of the parts that are saved and loaded."""
        return ["image_processor", "tokenizer"]

    @classmethod
    def stock_name(cls) -> str:
        """Returns the name of transformers' class that this one derives from."""
        return next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("transformers."))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `processor_config.json` holds."""
        return {**super().to_dict(), "processor_class": self.stock_name()}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes processor and tokenizer into a folder; returns the files."""
        files: list[str] = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        config = Path(save_directory, "tokenizer_config.json")
        settings = json.loads(config.read_text(encoding="utf-8")) | {"processor_class": self.stock_name()}
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


class ImageTextProcessor(_ImagesAndText, InternVLProcessor):
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
        # InternVLProcessor.__init__ is left out on purpose: it asks the tokenizer for a video token.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `processor_config.json`, with a video processor that transformers' own class needs.

        Frames are read as images of one tile.
        """
        saved = super().to_dict()
        frames = {name: value for name, value in saved["image_processor"].items() if name in _OF_FRAMES}
        return {**saved, "video_processor": {**frames, "video_processor_type": "InternVLVideoProcessor"}}


_OF_FRAMES = {
    *("do_convert_rgb", "do_resize", "size", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
}
"""Settings of an image processor that a video processor has too."""


class LlavaImageTextProcessor(_ImagesAndText, LlavaProcessor):
    """LLaVA's: one square crop per image, one token per patch."""

    layout = BatchLayout(image_embeds="list")


class Qwen2ImageTextProcessor(_ImagesAndText, Qwen2_5_VLProcessor):
    """Qwen2-VL's and Qwen2.5-VL's: patches at native resolution, a grid beside them."""

    layout = BatchLayout(image_embeds="list")


class Qwen3ImageTextProcessor(_ImagesAndText, Qwen3VLProcessor):
    """Qwen3-VL's."""

    layout = BatchLayout(image_embeds="list")


class Idefics3ImageTextProcessor(_ImagesAndText, Idefics3Processor):
    """Idefics3's: tiles and a global view, an axis of rows before that of images."""

    layout = BatchLayout(row_axis=True, image_embeds="list")


class SmolVLMImageTextProcessor(_ImagesAndText, SmolVLMProcessor):
    """SmolVLM's, which is Idefics3's with other sizes."""

    layout = BatchLayout(row_axis=True, image_embeds="list")

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_len: int = 169,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        # SmolVLMProcessor.__init__ is left out on purpose: it asks for num2words, which only videos need.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.end_of_utterance_token = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.video_token = getattr(tokenizer, "video_token", "<video>")
        self.image_seq_len = image_seq_len

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Renders a conversation; the stock method asks the video processor how many frames it takes."""
        return ProcessorMixin.apply_chat_template(self, conversation, chat_template, **kwargs)


class TextProcessor:
    """A tokenizer in the shape of a processor, for bases that read text only."""

    layout = BatchLayout()
    image_processor = image_token = image_token_id = None

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template

    def __call__(self, images: None = None, text: Sequence[str] = (), **kwargs: Any) -> Mapping[str, np.ndarray]:
        """Tokenizes `text`, in which the chat template has written all special tokens."""
        assert images is None, "rows with images were set aside before"
        return self.tokenizer(list(text), add_special_tokens=False, **kwargs)

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """Renders a conversation; the parts of a message are joined, as the templates of text models want it."""
        messages = [
            {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
            for message in conversation
        ]
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save_pretrained(folder)


def internvl(folder: Path, tokenizer: Any, settings: Mapping[str, Any], max_tiles: int | None) -> ImageTextProcessor:
    """Makes InternVL's processor; `settings` are those of `processor_config.json`."""
    images = GotOcr2ImageProcessorPil.from_pretrained(folder)
    if max_tiles is not None:
        images.max_patches = max_tiles
    return ImageTextProcessor(
        images,
        tokenizer,
        image_seq_length=settings.get("image_seq_length", 256),
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )


def _rule(processor_class: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Returns the rule that makes a processor of `kind`, with the settings called `names`."""

    def make(folder: Path, tokenizer: Any, settings: Mapping[str, Any], max_tiles: int | None) -> Any:
        chosen = {name: settings[name] for name in names if settings.get(name) is not None}
        template = settings.get("chat_template") or tokenizer.chat_template
        return processor_class(
            AutoImageProcessor.from_pretrained(folder, backend="pil"), tokenizer, chat_template=template, **chosen
        )

    return make


llava = _rule(LlavaImageTextProcessor, "patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
qwen2_5_vl = _rule(Qwen2ImageTextProcessor)
qwen3_vl = _rule(Qwen3ImageTextProcessor)
idefics3 = _rule(Idefics3ImageTextProcessor, "image_seq_len")
smolvlm = _rule(SmolVLMImageTextProcessor, "image_seq_len")


def text(folder: Path, tokenizer: Any, settings: Mapping[str, Any], max_tiles: int | None) -> TextProcessor:
    """Makes the processor of a base that reads text only."""
    return TextProcessor(tokenizer, settings.get("chat_template"))
