"""A base: the frozen vision-language model with its processor and the fingerprint that experts are bound to."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging

from pipeline.config import BaseModelConfig
from pipeline.models.processors import ImageTextProcessor, load_processor
from pipeline.models.tiny import TINY_BASE


class BaseError(ValueError):
    """A base that cannot be found or loaded."""


@dataclass(frozen=True)
class Base:
    """A loaded base."""

    model: PreTrainedModel
    processor: ImageTextProcessor
    fingerprint: str
    label: str
    folder: Path

    @property
    def width(self) -> int:
        """Width D of the language model."""
        return self.model.config.get_text_config().hidden_size


def checkpoint_folder(config: BaseModelConfig) -> Path:
    """Returns the local folder of a base's checkpoint; downloads it if `path` is a hub id.

    Raises BaseError where there is neither.
    """
    if config.path == "tiny":
        folder = TINY_BASE
    elif Path(config.path).exists():
        folder = Path(config.path).resolve()
    elif config.path.count("/") == 1 and not config.path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            folder = Path(
                snapshot_download(config.path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"])
            )
        except (OSError, HFValidationError) as error:
            raise BaseError(
                f"base.path: {config.path} is neither a folder here nor to be had from the hub: {error}"
            ) from None
    else:
        raise BaseError(f"base.path: {config.path} does not exist; give a checkpoint folder, a hub id, or `tiny`")
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise BaseError(f"base.path: {folder} holds no config.json with *.safetensors (pickled weights are refused)")
    return folder


def fingerprint(folder: Path) -> str:
    """Returns 16 hex digits over the checkpoint's configuration and weights (reads all of them: about 1 s a GB)."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _fingerprint(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hashes names and contents; sizes and times are there for the cache to notice a folder that was written anew."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_base(config: BaseModelConfig) -> Base:
    """Loads model (frozen, in evaluation mode), processor and fingerprint.

    Safetensors only; code that comes with a checkpoint runs only with `trust_remote_code`.
    """
    folder = checkpoint_folder(config)
    logging.disable_progress_bar()  # one bar for every worker and evaluator
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
    )
    model.requires_grad_(False)
    model.eval()
    processor = load_processor(folder, trust_remote_code=config.trust_remote_code)
    return Base(model, processor, fingerprint(folder), config.label, folder)
