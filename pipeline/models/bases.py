"""A base: the frozen model with its processor and the fingerprint that experts are bound to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import is_flash_attn_2_available, logging

from pipeline.config import BaseModelConfig
from pipeline.models.checkpoints import BaseError, checkpoint, fingerprint
from pipeline.models.families import TEXT, Family, FamilyError, family_of
from pipeline.models.placement import CPU, device_map

_logger = getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A loaded base."""

    model: PreTrainedModel
    processor: Any
    family: Family
    fingerprint: str
    label: str
    folder: Path

    @property
    def width(self) -> int:
        """Width D of the language model."""
        return self.model.config.get_text_config().hidden_size


FLASH = "flash_attention_2"


def flash_is_here() -> bool:
    """Whether this process can use flash attention."""
    return torch.cuda.is_available() and is_flash_attn_2_available()


@lru_cache(maxsize=8)  # one warning per process
def as_loadable_here(config: BaseModelConfig) -> BaseModelConfig:
    """Returns a base that was registered on another machine as this one can load it, with a warning where that differs."""
    if config.attention != FLASH or flash_is_here():
        return config
    _logger.warning("%s is not available on this machine: attention sdpa is used, answers differ by rounding", FLASH)
    return config.model_copy(update={"attention": "sdpa"})


def family_at(folder: Path, *, trust_remote_code: bool = False) -> Family:
    """Returns the family of a checkpoint; raises BaseError for one that the table does not have."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return family_of(config)
    except FamilyError as error:
        raise BaseError(f"base.path: {folder}: {error}") from None
    except ImportError as error:
        raise BaseError(f"base.path: {folder}: a package is missing: {error}") from None
    except (ValueError, OSError) as error:
        raise BaseError(f"base.path: {folder}: its configuration cannot be read: {error}") from None


def language_width(config: BaseModelConfig) -> int:
    """Returns the width D of a base's language model, without loading it."""
    settings = AutoConfig.from_pretrained(checkpoint(config), trust_remote_code=config.trust_remote_code)
    return int(settings.get_text_config().hidden_size)


def load_processor(config: BaseModelConfig) -> Any:
    """Loads the processor of a base by its family's rule."""
    folder = checkpoint(config)
    family = family_at(folder, trust_remote_code=config.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings, _ = ProcessorMixin.get_processor_dict(str(folder))
    processor = family.processor(folder, tokenizer, settings, config.max_tiles)
    if processor.chat_template is None:
        raise BaseError(
            f"base.path: {folder} has no chat template, which prompts need; put the template of the "
            "instruction-tuned model there as chat_template.jinja"
        )
    return processor


def load_base(config: BaseModelConfig, *, vision: bool = True, devices: Sequence[str] = (CPU,)) -> Base:
    """Loads model (frozen, in evaluation mode), processor and fingerprint.

    Safetensors only; code that comes with a checkpoint runs only with `trust_remote_code`. Without
    `vision` the vision parts are not kept in memory: image embeddings must have been computed before. Several `devices`
    each hold a part of the layers (see `placement`); inputs go to the first, and outputs come from it.
    """
    folder = checkpoint(config)
    if config.attention == FLASH and not flash_is_here():
        raise BaseError(
            f"base.attention: {FLASH} needs the package flash-attn and a GPU, and this machine has not both; set "
            "base.attention to sdpa, whose answers are the same up to rounding"
        )
    family = family_at(folder, trust_remote_code=config.trust_remote_code)
    logging.disable_progress_bar()  # every worker would show one
    placed = _placed(folder, config, family, vision, devices) if tuple(devices) != (CPU,) else None
    auto_class = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    try:
        model = auto_class.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            device_map=placed,
        )
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise BaseError(f"base.path: {folder} cannot be loaded: {error}") from None
    if not vision:
        for path in family.vision:
            model.set_submodule(path, nn.Identity())
    model.requires_grad_(False)
    model.eval()
    return Base(model, load_processor(config), family, fingerprint(folder), config.label, folder)


def _placed(
    folder: Path, config: BaseModelConfig, family: Family, vision: bool, devices: Sequence[str]
) -> dict[str, str]:
    """Returns the device of each part of a base, by its path."""
    if len(devices) == 1:
        return {"": devices[0]}
    model, _ = empty_model(config)
    model.tie_weights()
    return device_map(model, family, devices, vision=vision)


def empty_model(config: BaseModelConfig) -> tuple[Any, Family]:
    """Builds the model of a base, and names its family, without weights: on PyTorch's meta device, which holds shapes only."""
    folder = checkpoint(config)
    family = family_at(folder, trust_remote_code=config.trust_remote_code)
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    auto_class = AutoModelForCausalLM if family is TEXT else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto_class.from_config(settings, trust_remote_code=config.trust_remote_code), family
