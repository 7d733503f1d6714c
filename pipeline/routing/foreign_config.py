"""The `adapter_config.json` of a LoRA that somebody else has trained: what it says, and what cannot be routed."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.routing.adapters import ExpertError

RETRAIN = "train it as a plain LoRA"

UNSUPPORTED = {
    "use_dora": "DoRA scales the base's weights as well",
    "modules_to_save": "it holds whole layers beside the LoRA",
    "lora_bias": "its B has a bias",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it changes parameters that are no Linear's",
    "layer_replication": "it makes another model of the base's layers",
    "alora_invocation_tokens": "an activated LoRA is off until certain tokens",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "a block-diagonal LoRA has other matrices",
}
"""Fields of PEFT that change what an adapter computes, and how."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Named initialisations after which an adapter is a plain LoRA; others (PiSSA, OLoRA, CorDA, LoftQ) change the base as well."""

_NAME = re.compile(r"\^?(?:\w|\\?\.)+")
"""Keys of `rank_pattern` and `alpha_pattern` that are names; a stranger's regular expression may take for ever."""


class ForeignAdapterError(ExpertError):
    """An adapter folder that cannot become an expert of this base; the message names file, field and remedy."""


@dataclass(frozen=True)
class ForeignConfig:
    """What a LoRA's configuration says of its matrices."""

    file: Path
    base_name: str | None
    """What it calls its base."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    """Ranks of Linears that have another one, by the end of their names."""
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    """Whether the update is scaled by alpha / sqrt(rank)."""
    adapts_all_layers: bool
    """Whether its targets are names of Linears, without a choice of layers."""

    def rank_of(self, name: str) -> int:
        """Returns the rank of a Linear by PEFT's name of it."""
        return int(_matching(self.rank_pattern, name, self.rank))

    def scaling_of(self, name: str) -> float:
        """Returns by what the update of a Linear is multiplied."""
        rank, alpha = self.rank_of(name), _matching(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_foreign_config(file: Path) -> ForeignConfig:
    """Reads an `adapter_config.json`; raises ForeignAdapterError for what is no plain LoRA."""
    fields = _fields(file)
    if fields.get("peft_type") != "LORA":
        raise ForeignAdapterError(
            f"{file}: peft_type is {fields.get('peft_type')!r}; only LORA can be routed: {RETRAIN}"
        )
    for name, why in UNSUPPORTED.items():
        if fields.get(name):
            raise ForeignAdapterError(
                f"{file}: {name} is set: {why}, which cannot be routed; {RETRAIN}, without {name}"
            )
    if (bias := fields.get("bias") or "none") != "none":
        raise ForeignAdapterError(f"{file}: bias is {bias!r}: biases cannot be routed; {RETRAIN}, with bias 'none'")
    init = fields.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise ForeignAdapterError(
            f"{file}: init_lora_weights is {init!r}, which changes the base's weights; convert the adapter with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    targets, base_name = fields.get("target_modules"), fields.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        raise _wrong(file, "base_model_name_or_path", base_name, "a name, or null")
    by_name = isinstance(targets, list) and not any(".layers." in str(target) for target in targets)
    return ForeignConfig(
        file=file,
        base_name=base_name or None,
        rank=_rank(file, "r", fields.get("r")),
        alpha=_alpha(file, "lora_alpha", fields.get("lora_alpha")),
        rank_pattern={key: _rank(file, f"rank_pattern.{key}", v) for key, v in _pattern(file, fields, "rank_pattern")},
        alpha_pattern={
            key: _alpha(file, f"alpha_pattern.{key}", v) for key, v in _pattern(file, fields, "alpha_pattern")
        },
        use_rslora=bool(fields.get("use_rslora")),
        adapts_all_layers=by_name and fields.get("layers_to_transform") is None,
    )


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (OSError, ValueError, RecursionError) as error:
        raise ForeignAdapterError(f"{file}: cannot be read: {error}; copy the adapter's folder again") from None
    if not isinstance(fields, dict):
        raise ForeignAdapterError(f"{file}: holds no JSON object; copy the adapter's folder again")
    return fields


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; raises ValueError where a key comes twice, of which readers take one or the other."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return fields


def _pattern(file: Path, fields: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise _wrong(file, name, pattern, "an object")
    for key in pattern:
        if not _NAME.fullmatch(key):
            raise ForeignAdapterError(
                f"{file}: {name}: {key!r} is a regular expression; write the Linears' names instead"
            )
    return list(pattern.items())


def _matching(pattern: Mapping[str, float], name: str, default: float) -> float:
    """Returns the value of the first key that is the end of a name, as PEFT looks it up."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _rank(file: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(file, name, value, "a number from 1 on")
    return value


def _alpha(file: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _wrong(file, name, value, "a number above 0")
    return float(value)


def _wrong(file: Path, name: str, value: Any, expected: str) -> ForeignAdapterError:
    return ForeignAdapterError(
        f"{file}: {name} is {value!r}, expected {expected}; correct it, or copy the adapter's folder again"
    )
