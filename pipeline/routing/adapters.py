"""The LoRA of an expert in PEFT's own files: `adapter_config.json` and `adapter_model.safetensors`.

Shapes: R rank, D input width, O output width.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UserError, stored_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REMEDY = "copy the folder again, or load the pool from its registry, which has them all (models:/<base>.pool.<name>@champion)"
"""What to do about an expert's damaged file."""
_KEY = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])\.weight$")


class ExpertError(UserError):
    """An expert folder that is incomplete, of another kind, or not trained; the message names file and remedy."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one Linear: y = W x + scaling B A x."""

    a_RD: Tensor
    b_OR: Tensor
    scaling: float


class StoredAdapters(Mapping[str, Adapter]):
    """The adapters of a safetensors file by module path.

    Paths and ranks cost its header; its weights are checked by `check` and memory-mapped when the first is looked up.
    """

    def __init__(self, file: Path, scaling: float, check: Callable[[], None] = lambda: None) -> None:
        self._file, self._scaling, self._check = file, scaling, check

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each Linear's update."""
        halves: dict[str, dict[str, int]] = {}
        with stored_file(self._file, REMEDY, ExpertError), safe_open(self._file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                match = _KEY.match(key)
                if match is None:
                    raise ExpertError(f"{self._file}: unexpected tensor {key!r}; only LoRA A and B are known")
                shape = opened.get_slice(key).get_shape()
                halves.setdefault(match["path"], {})[match["half"]] = shape[0] if match["half"] == "A" else shape[1]
        for path, half in halves.items():
            if missing := {"A", "B"} - half.keys():
                raise ExpertError(f"{self._file}: {path} has no lora_{missing.pop()}; {REMEDY}")
        return {path: half["A"] for path, half in sorted(halves.items())}

    @cached_property
    def _adapters(self) -> dict[str, Adapter]:
        with stored_file(self._file, REMEDY, ExpertError):
            self._check()
            weights = load_file(self._file)
            halves = {path: [weights[adapter_key(path, half)] for half in "AB"] for path in self.ranks}
            return {path: Adapter(a_RD, b_OR, self._scaling) for path, (a_RD, b_OR) in halves.items()}

    def __getitem__(self, path: str) -> Adapter:
        return self._adapters[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)


def ranks_of(adapters: Mapping[str, Adapter]) -> Mapping[str, int]:
    """Returns the rank of each Linear's update by module path, without reading weights."""
    return adapters.ranks if isinstance(adapters, StoredAdapters) else {p: len(a.a_RD) for p, a in adapters.items()}


def load_adapters(folder: str | Path) -> tuple[dict[str, Any], dict[str, Adapter]]:
    """Reads a stock PEFT LoRA folder: its configuration and the adapters by module path; raises ExpertError."""
    config, scaling = read_adapter_config(Path(folder))
    return config, dict(StoredAdapters(Path(folder) / ADAPTER_WEIGHTS, scaling))


def read_adapter_config(folder: Path) -> tuple[dict[str, Any], float]:
    """Reads the configuration of a stock PEFT LoRA folder and the scaling that it says; raises ExpertError."""
    with stored_file(folder / ADAPTER_CONFIG, REMEDY, ExpertError):
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        if not isinstance(config, dict):
            raise TypeError(f"an object was expected, found {type(config).__name__}")
    unsupported = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        raise ExpertError(
            f"{folder / ADAPTER_CONFIG}: only plain LoRA can be routed; found peft_type {config.get('peft_type')!r}, "
            f"bias {config.get('bias')!r}, {', '.join(unsupported) or 'nothing else unusual'}"
        )
    with stored_file(folder / ADAPTER_CONFIG, REMEDY, ExpertError):
        return config, config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def adapter_key(path: str, half: str) -> str:
    """Returns PEFT's name of a half (A or B) of a Linear's LoRA."""
    return f"base_model.model.{path}.lora_{half}.weight"
