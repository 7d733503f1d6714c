"""Converts an original InternVL2 folder into one that transformers and this project load.

- Tensors are read one at a time from memory-mapped files; at most one new file is in memory.
- Every tensor is accounted for: before anything is written, the folder's tensors are compared with those of the new model by
  name and shape. Values keep their precision.
- The new folder is written beside its target and moved there when it is complete.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, InternVLConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from pipeline.files import atomic_folder
from pipeline.models.internvl2.chat import CHATS, SYSTEM_MESSAGE
from pipeline.models.internvl2.config import (
    Fields,
    architecture,
    convert_config,
    image_side,
    read_config,
    tokens_per_tile,
)
from pipeline.models.internvl2.names import HEADS, Move, check_complete, conversion_plan
from pipeline.models.internvl2.source import ConversionError, SourceFolder
from pipeline.models.internvl2.tokenizer import convert_tokenizer
from pipeline.models.processors import ImageTextProcessor

GB = 10**9

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in total."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    parameters: int
    nbytes: int
    """Bytes of the weights."""
    files: int
    """Files of weights."""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    force: bool = False,
    shard_bytes: int = 4 * GB,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Converts the folder `source` into `target`; raises ConversionError where it cannot, and then leaves `target` alone.

    No file of weights is larger than `shard_bytes`, unless a single tensor is. A `target` with anything in it is replaced
    only with `force`.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, force=force)
    original = SourceFolder(source)
    fields = read_config(original.config, source / "config.json")
    processor = _processor(fields, original)
    config, moves = _model(fields, original, processor)
    check_complete(moves, original.tensors, str(source))
    total = sum(stored.nbytes for stored in original.tensors.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < total:
        raise ConversionError(
            f"{target}: {total / GB:.1f} GB are to be written, {free / GB:.1f} GB are free there; make room"
        )
    shards = _shards(moves, original, shard_bytes)
    with atomic_folder(target) as staging:
        config.save_pretrained(staging)
        processor.save_pretrained(staging)
        _generation(fields, original, processor).save_pretrained(staging)
        _write(shards, original, staging, total, progress)
    parameters = sum(shape.numel() for move in moves for shape in move.shapes)
    return Converted(target, parameters, total, len(shards))


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConversionError(f"{target}: holds the original folder {source}; name another folder")
    if target.is_file():
        raise ConversionError(f"{target}: a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConversionError(f"{target}: not empty; name another folder, or replace it with --force")


def _processor(fields: Fields, original: SourceFolder) -> ImageTextProcessor:
    """Makes the processor; tiles as in training: up to `max_dynamic_patch` and a thumbnail, ImageNet's mean and deviation."""
    chat = CHATS[fields.one_of("template", tuple(CHATS), None)]
    system = fields.values.get("system_message")
    if not isinstance(system, str | None):
        raise fields.error("system_message", f"must be text, found {system!r}")
    tokenizer = convert_tokenizer(original, chat, SYSTEM_MESSAGE if system is None else system)
    side, dynamic = image_side(fields), fields.values.get("dynamic_image_size", False)
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=dynamic,
        min_patches=fields.values.get("min_dynamic_patch", 1),
        max_patches=fields.values.get("max_dynamic_patch", 6) if dynamic else 1,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return ImageTextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_length=tokens_per_tile(fields),
        chat_template=tokenizer.chat_template,
    )


def _model(fields: Fields, original: SourceFolder, processor: ImageTextProcessor) -> tuple[InternVLConfig, list[Move]]:
    """Returns the new configuration and the plan of tensors."""
    language_class, text = architecture(fields), fields.section("llm_config")
    head = HEADS.get(language_class, "language_model.lm_head.weight")
    tied = text.values.get("tie_word_embeddings", False) and head not in original.tensors
    config = convert_config(fields, image_token_id=processor.image_token_id, tied=tied)
    if len(processor.tokenizer) > config.text_config.vocab_size:
        sizes = f"{config.text_config.vocab_size}, but the tokenizer has {len(processor.tokenizer)} tokens"
        raise text.error("vocab_size", f"{sizes}; take both from one release")
    precisions: Counter[str] = Counter()
    for stored in original.tensors.values():
        precisions[str(stored.dtype).removeprefix("torch.")] += stored.nbytes
    config.dtype = precisions.most_common(1)[0][0]
    return config, conversion_plan(config, language_class)


def _generation(fields: Fields, original: SourceFolder, processor: ImageTextProcessor) -> GenerationConfig:
    """Answers end with the token that ends a message, or with any end token of the original."""
    tokenizer = processor.tokenizer
    ends = [tokenizer.eos_token_id]
    for values in (original.json("generation_config.json", required=False), fields.section("llm_config").values):
        more = values.get("eos_token_id")
        ends += more if isinstance(more, list) else [] if more is None else [more]
    return GenerationConfig(
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def _shards(moves: Sequence[Move], original: SourceFolder, shard_bytes: int) -> list[list[Move]]:
    """Fills files in the model's order."""
    shards: list[list[Move]] = [[]]
    room = shard_bytes
    for move in moves:
        size = original.tensors[move.source].nbytes
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(move)
        room -= size
    return shards


def _write(
    shards: Sequence[Sequence[Move]], original: SourceFolder, folder: Path, total: int, progress: Progress
) -> None:
    weight_map: dict[str, str] = {}
    done = 0
    progress(0, total)
    for number, moves in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for move in moves:
            tensors |= move.parts(original.read(move.source))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # safetensors lets nobody but the owner read its files
        weight_map |= dict.fromkeys(tensors, name)
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
