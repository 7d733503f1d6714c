"""Reads an original folder as OpenGVLab publishes it, without running its code and one tensor at a time.

- JSON files, with errors that name the file.
- Names, shapes and dtypes of all tensors first; values one tensor at a time, from memory-mapped files: safetensors, or
  PyTorch's `pytorch_model*.bin`, of which nothing but tensors is ever unpickled.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UserError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Data types that are converted, by their names in safetensors files; all others are quantised."""


class ConversionError(UserError):
    """A folder that cannot be converted; the message names file, field or tensor, and remedy."""


@dataclass(frozen=True)
class Stored:
    """File, shape and data type of a stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SourceFolder:
    """An original folder; raises ConversionError where it is none or incomplete."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConversionError(
                f"{self.folder}: no such folder; download the model first, e.g. OpenGVLab/InternVL2-2B"
            )
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self.config = self.json("config.json")
        self.tensors = self._list_tensors()

    def json(self, name: str, *, required: bool = True) -> dict[str, Any]:
        """Returns a JSON file's object; of a file that is neither there nor `required`, an empty one."""
        file = self.folder / name
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not required:
                return {}
            raise ConversionError(f"{file}: missing; the folder must be complete, as it was published") from None
        except ValueError as error:
            raise ConversionError(f"{file}: not valid JSON: {error}; download it again") from None
        if not isinstance(values, dict):
            raise ConversionError(f"{file}: must hold an object, found {type(values).__name__}; download it again")
        return values

    def _files(self) -> list[Path]:
        """Returns the weight files; safetensors where there are both kinds."""
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (self.folder / index).is_file():
                names = sorted(set(self.json(index).get("weight_map", {}).values()))
                missing = [name for name in names if not (self.folder / name).is_file()]
                if missing or not names:
                    raise ConversionError(
                        f"{self.folder / index}: names {', '.join(missing) or 'no files'}, which the folder does not hold; "
                        "download the rest"
                    )
                return [self.folder / name for name in names]
            if (self.folder / single).is_file():
                return [self.folder / single]
        raise ConversionError(
            f"{self.folder}: no weights; expected model.safetensors, model.safetensors.index.json with its files, or "
            "pytorch_model*.bin"
        )

    def _list_tensors(self) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        for file in self._files():
            for name, stored in self._list_file(file).items():
                if name in tensors:
                    raise ConversionError(f"{file}: tensor {name} lies in {tensors[name].file.name} already")
                tensors[name] = stored
        return tensors

    def _list_file(self, file: Path) -> dict[str, Stored]:
        if file.suffix == ".bin":
            return {name: Stored(file, tuple(t.shape), t.dtype) for name, t in self._pickled(file).items()}
        tensors = {}
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ConversionError(
                        f"{file}: tensor {name} is {view.get_dtype()}; only bfloat16, float16 and float32 are converted: take "
                        "the model that is not quantised"
                    )
                tensors[name] = Stored(file, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        return tensors

    def _pickled(self, file: Path) -> Mapping[str, Tensor]:
        """Returns the tensors of a `.bin` file, memory-mapped; the last file stays open."""
        if self._opened is not None and self._opened[0] == file:
            return self._opened[1]
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise ConversionError(
                f"{file}: it holds more than tensors, and unpickling that would run code; take the safetensors files"
            ) from None
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ConversionError(f"{file}: cannot be read: {reason}; download it again, or take safetensors") from None
        if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ConversionError(f"{file}: not a mapping of names to tensors; take the safetensors files")
        self._opened = file, loaded
        return loaded

    def read(self, name: str) -> Tensor:
        """Returns a tensor, memory-mapped where its file allows."""
        file = self.tensors[name].file
        if file.suffix == ".bin":
            return self._pickled(file)[name]
        with _open(file) as opened:
            return opened.get_tensor(name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ConversionError(
            f"{file}: not a complete safetensors file ({error}): an interrupted download, or a Git LFS pointer? Download it "
            "again"
        ) from None
