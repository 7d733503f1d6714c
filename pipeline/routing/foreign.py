"""LoRAs that somebody else has trained, checked and brought into the form of this project's own.

Everything about them is doubted: nothing is unpickled, no file outside the folder is read, shapes and values are compared with
the base before anything is made of them. Shapes: R rank, D input width, O output width.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.routing.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter
from pipeline.routing.foreign_config import ForeignAdapterError, ForeignConfig, distinct, read_foreign_config
from pipeline.routing.foreign_names import BaseLinears, Half, halves_of
from pipeline.routing.peft_folder import padded, write_peft_folder

DTYPES = ("F32", "F16", "BF16")
"""Types that float32, in which experts are kept, holds to the last bit."""
COPY = "copy the adapter's folder again"
LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""


@dataclass(frozen=True, eq=False)
class ForeignAdapter:
    """A LoRA of one rank and scaling on Linears of this base."""

    adapters: Mapping[str, Adapter]
    """By module path, in float32."""
    rank: int
    alpha: float
    source: str
    """What it was called where it came from, for people."""

    @cached_property
    def content(self) -> str:
        """Digest (64 hex digits) of what it computes: the same weights in other files, types or names have the same."""
        return content_of(self.adapters, self.rank, self.alpha)

    def save(self, folder: Path) -> None:
        """Writes it as a stock PEFT folder that is not there yet."""
        write_peft_folder(folder, self.adapters, base_name=None, rank=self.rank)


def foreign_adapter(folder: str | Path, linears: BaseLinears) -> ForeignAdapter:
    """Reads a PEFT LoRA folder as an adapter of the base that has these Linears; raises ForeignAdapterError.

    Ranks and alphas of single Linears (`rank_pattern`, `alpha_pattern`) and rsLoRA's scaling become one rank and one alpha:
    A and B are padded with zeros, B is multiplied by the ratio of the scalings, both the same update up to the rounding of
    float32. Where all Linears have one scaling, no value changes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ForeignAdapterError(
            f"{folder}: no such folder; name a PEFT adapter's folder ({ADAPTER_CONFIG}, {ADAPTER_WEIGHTS})"
        )
    config = read_foreign_config(_file(folder, ADAPTER_CONFIG))
    _check_base(config, linears)
    weights = _file(folder, ADAPTER_WEIGHTS)
    halves = halves_of(weights, _keys(weights), linears)
    pairs = _pairs(weights, halves)
    if config.adapts_all_layers:
        _check_layers(config, pairs, linears)
    read = _read(weights, pairs, config, linears)
    if not any(bool(adapter.b_OR.any()) for adapter in read.values()):
        raise ForeignAdapterError(f"{weights}: every B is zero: it was never trained; name a trained adapter")
    rank = max(len(adapter.a_RD) for adapter in read.values())
    scalings = [adapter.scaling for adapter in read.values()]
    scaling = max(sorted(set(scalings)), key=scalings.count)
    canonical = {path: padded(_rescaled(adapter, scaling), rank) for path, adapter in read.items()}
    for path, adapter in canonical.items():
        if not torch.isfinite(adapter.b_OR * scaling).all():
            raise ForeignAdapterError(
                f"{config.file}: lora_alpha, or alpha_pattern, makes the update of {path} larger than float32 holds; correct "
                f"it, or {COPY}"
            )
    return ForeignAdapter(
        canonical, rank, scaling * rank, f"{folder.absolute().name} (base {config.base_name or 'not named'})"
    )


def content_of(adapters: Mapping[str, Adapter], rank: int, alpha: float) -> str:
    """Returns the digest (64 hex digits) of adapters of one rank and alpha."""
    digest = hashlib.sha256(json.dumps([rank, alpha]).encode())
    for path, adapter in sorted(adapters.items()):
        digest.update(path.encode())
        for tensor in (adapter.a_RD, adapter.b_OR):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _file(folder: Path, name: str) -> Path:
    """Returns a file of the folder; raises ForeignAdapterError where it is missing, or lies elsewhere."""
    file = folder / name
    if not file.exists():
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if name == ADAPTER_WEIGHTS and pickled:
            raise ForeignAdapterError(
                f"{folder / pickled[0]}: pickled weights can run code and are not read; convert them where you trust them: "
                f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled[0]}', map_location='cpu', "
                f"weights_only=True), '{ADAPTER_WEIGHTS}')\""
            )
        below = next((f", such as {other.parent}" for other in sorted(folder.glob(f"*/{name}"))), "")
        raise ForeignAdapterError(f"{folder}: {name} is missing; name a PEFT adapter's folder{below}, or {COPY}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ForeignAdapterError(
            f"{file}: is a link to a file outside the folder; copy the folder with its files (cp -rL)"
        )
    if not file.is_file():
        raise ForeignAdapterError(f"{file}: is no file; {COPY}")
    return file


def _check_base(config: ForeignConfig, linears: BaseLinears) -> None:
    """Raises ForeignAdapterError where the configuration names a base that is plainly another.

    Names can be compared where both are public; a folder's name on somebody's machine says nothing.
    """
    named = config.base_name
    is_public = named is not None and re.fullmatch(r"[\w-]+/[\w.-]+", named) is not None
    if named is None or not linears.is_public or not is_public:
        return
    own = {_plain(name) for name in linears.names}
    if not any(_plain(named) in name or name in _plain(named) for name in own):
        raise ForeignAdapterError(
            f"{config.file}: base_model_name_or_path is {named!r}, and the base is {linears.names[0]}; name that base, or, if "
            "the weights are the same under another name, set the field to null"
        )


def _plain(name: str) -> str:
    """Returns the last part of a name, without what spellings differ in."""
    return re.sub(r"[^a-z0-9]|hf$", "", name.rpartition("/")[2].lower())


def _keys(weights: Path) -> list[str]:
    """Reads the names of the tensors; raises ForeignAdapterError for a damaged file, or one that names a tensor twice."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length), object_pairs_hook=distinct)
        with safe_open(weights, framework="pt"):  # checks offsets and the file's length
            pass
    except (OSError, ValueError, RecursionError, struct.error, SafetensorError) as error:
        raise ForeignAdapterError(f"{weights}: no valid safetensors file: {error}; {COPY}") from None
    header.pop("__metadata__", None)
    if not header:
        raise ForeignAdapterError(f"{weights}: holds no tensor; under ZeRO-3 gather the weights before saving them")
    for key, tensor in header.items():
        if tensor["dtype"] not in DTYPES:
            raise ForeignAdapterError(
                f"{weights}: tensor {key!r} is {tensor['dtype']}; save the adapter as float32, bfloat16 or float16"
            )
    return list(header)


def _pairs(weights: Path, halves: list[Half]) -> dict[str, tuple[Half, Half]]:
    """Returns A and B of every Linear by path; raises ForeignAdapterError where one is missing or there twice."""
    found: dict[str, dict[str, Half]] = {}
    for half in halves:
        other = found.setdefault(half.path, {}).setdefault(half.half, half)
        if other is not half:
            raise ForeignAdapterError(
                f"{weights}: {other.key!r} and {half.key!r} are the same half of one Linear; remove one"
            )
    for path, pair in found.items():
        if missing := {"A", "B"} - pair.keys():
            raise ForeignAdapterError(f"{weights}: {path} has no lora_{missing.pop()}; {COPY}")
    return {path: (pair["A"], pair["B"]) for path, pair in sorted(found.items())}


def _check_layers(config: ForeignConfig, paths: Mapping[str, object], linears: BaseLinears) -> None:
    adapted = {number for path in paths for number in linears.layers if f".layers.{number}." in path}
    if adapted != linears.layers:
        raise ForeignAdapterError(
            f"{config.file}: target_modules chooses Linears of all layers, and {ADAPTER_WEIGHTS} has those of {len(adapted)}; "
            f"the base has {len(linears.layers)}: it is an adapter of another base; where some layers are meant, set "
            "layers_to_transform"
        )


def _read(
    weights: Path, pairs: Mapping[str, tuple[Half, Half]], config: ForeignConfig, linears: BaseLinears
) -> dict[str, Adapter]:
    """Reads A and B of every Linear, each with its own rank and scaling, once their shapes are those of the base."""
    with safe_open(weights, framework="pt") as file:
        for a, b in pairs.values():
            _check_shapes(
                weights, a, b, file.get_slice(a.key).get_shape(), file.get_slice(b.key).get_shape(), config, linears
            )
        read = {}
        for path, (a, b) in pairs.items():
            a_RD, b_OR = (file.get_tensor(half.key).float() for half in (a, b))
            for half, tensor in ((a, a_RD), (b, b_OR)):
                if not torch.isfinite(tensor).all():
                    raise ForeignAdapterError(
                        f"{weights}: tensor {half.key!r} holds a value that is not finite; its training has diverged, or {COPY}"
                    )
            read[path] = Adapter(a_RD, b_OR, config.scaling_of(a.name))
    return read


def _check_shapes(
    weights: Path, a: Half, b: Half, a_shape: list[int], b_shape: list[int], config: ForeignConfig, linears: BaseLinears
) -> None:
    if len(a_shape) != 2 or len(b_shape) != 2:
        raise ForeignAdapterError(
            f"{weights}: {a.key!r} and its B have shapes {a_shape} and {b_shape}, expected matrices; {COPY}"
        )
    if a_shape[0] != b_shape[1]:
        raise ForeignAdapterError(f"{weights}: {a.key!r} has rank {a_shape[0]}, its B has rank {b_shape[1]}; {COPY}")
    if a_shape[0] != (rank := config.rank_of(a.name)):
        raise ForeignAdapterError(
            f"{weights}: {a.key!r} has rank {a_shape[0]}, and {ADAPTER_CONFIG} says {rank} (r, rank_pattern); {COPY}"
        )
    if (b_shape[0], a_shape[1]) != linears.shapes[a.path]:
        width, inner = linears.shapes[a.path]
        raise ForeignAdapterError(
            f"{weights}: {a.key!r} is for a Linear from {a_shape[1]} to {b_shape[0]} features, and the base's has {inner} to "
            f"{width}: it is an adapter of another base; name that base, or another adapter"
        )


def _rescaled(adapter: Adapter, scaling: float) -> Adapter:
    """Returns an adapter of this scaling that computes the same."""
    if adapter.scaling == scaling:
        return adapter
    return Adapter(adapter.a_RD, adapter.b_OR * (adapter.scaling / scaling), scaling)
