"""Checkpoints of bases (local folder, hub id, URI or GGUF file) and their fingerprints."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import BaseModelConfig, without_secrets
from pipeline.errors import UserError, stored_file
from pipeline.files import user_cache
from pipeline.locks import made_once, staging
from pipeline.models.tiny import TINY_BASE

NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files that loading needs: no pickled weights, no code."""

CODE = "*.py"
"""A checkpoint's own code, which loading needs with `base.trust_remote_code`."""

DECISIVE = (
    "config.json", "generation_config.json", "*.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template.*", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Files that determine a base's answers."""

_ORIGIN = {"_name_or_path", "name_or_path", "transformers_version"}

CACHE = user_cache("bases")
"""Cache of bases from URIs and GGUF files."""


_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""Names of a file's version in object stores, the most reliable first."""


class BaseError(UserError):
    """A base that is missing or cannot be loaded; the message names it and the remedy."""


def checkpoint(config: BaseModelConfig) -> Path:
    """Returns the folder of a base's files; fetches or unpacks them if `path` is a hub id, a URI or a GGUF file.

    Raises BaseError.
    """
    path = config.path
    if path == "tiny":
        folder = TINY_BASE
    elif "://" in path:
        folder = _fetched(path, needed(code=config.trust_remote_code))
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser().resolve()
    elif Path(path).expanduser().is_file():
        folder = _unpacked(Path(path).expanduser().resolve())
    elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
        folder = _downloaded(path, config.revision, needed(code=config.trust_remote_code))
    else:
        raise BaseError(f"base.path: {path} does not exist; give a checkpoint folder, a hub id, a URI, or `tiny`")
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise BaseError(f"base.path: {folder} holds no config.json with *.safetensors (pickled weights are refused)")
    return folder


def hub_id(path: str) -> str | None:
    """Returns the `path` of a base if others know it by that: a hub id, or `tiny`; None for folders and URIs."""
    is_hub_id = path.count("/") == 1 and "://" not in path and not path.startswith((".", "/", "~"))
    return path if is_hub_id or path == "tiny" else None


def needed(*, code: bool) -> tuple[str, ...]:
    """Returns the patterns of the files that loading needs, with or without a checkpoint's own code."""
    return (*NEEDED, CODE) if code else NEEDED


def _downloaded(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise BaseError(f"base.path: {name} is not a local folder, and not found on the hub: {error}") from None


def _fetched(uri: str, patterns: Sequence[str]) -> Path:
    """Copies the files of a folder in an object store that match `patterns` into the cache, once; changed ones again.

    Of several processes on a machine one copies and the others wait. A file gets its name when its copy is complete.
    """
    shown = without_secrets(uri)
    folder = CACHE / hashlib.sha256(without_secrets(uri).rstrip("/").encode()).hexdigest()[:16]
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        root = root.rstrip("/")
        filesystem.invalidate_cache()  # an older listing in this process would hide changes
        remote_files = {Path(file).name: file for pattern in patterns for file in filesystem.glob(f"{root}/{pattern}")}
        if not remote_files:
            raise BaseError(f"base.path: {shown} holds no checkpoint: no config.json with *.safetensors")
        with staging(folder, why="which fetches the base") as unfinished:
            _synchronize(filesystem, remote_files, folder, unfinished)
    except ImportError as error:
        raise BaseError(
            f"base.path: {shown}: its filesystem is not installed: {error} (pip install s3fs, or gcsfs)"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, BaseError):
            raise
        raise BaseError(f"base.path: {shown} cannot be read: {error}") from None
    return folder


def _synchronize(filesystem: Any, remote_files: Mapping[str, str], folder: Path, unfinished: Path) -> None:
    """Makes `folder` hold exactly `remote_files` (paths in the store by name)."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder.with_name(f"{folder.name}.files")
    versions: dict[str, list[object]] = json.loads(record.read_text()) if record.exists() else {}
    for name, file in remote_files.items():
        target, info = folder / name, filesystem.info(file)
        size, version = int(info["size"]), _version(info)
        # Without a record (earlier releases wrote none) a file of the right size counts as unchanged.
        same = versions.get(name, [size, version]) == [size, version]
        versions[name] = [size, version]
        if same and target.exists() and target.stat().st_size == size:
            continue
        filesystem.get_file(file, str(unfinished / name))
        if (unfinished / name).stat().st_size != size:
            raise OSError(
                f"{name}: {(unfinished / name).stat().st_size:,} of {size:,} bytes; is it still being written?"
            )
        (unfinished / name).rename(target)
        _write_record(record, versions, unfinished)
    for file_here in files_of(folder):  # of a checkpoint that was sharded otherwise
        if file_here.name not in remote_files:
            file_here.unlink()
    _write_record(record, {name: versions[name] for name in remote_files}, unfinished)


def _version(info: Mapping[str, Any]) -> str | None:
    """Returns the version of a file in a store, if the store has one."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), None)


def _write_record(record: Path, versions: Mapping[str, list[object]], unfinished: Path) -> None:
    staging = unfinished / record.name
    staging.write_text(json.dumps(versions))
    staging.rename(record)


def _unpacked(file: Path) -> Path:
    """Writes a GGUF file's model and tokenizer as a checkpoint folder, once: reading the file takes half a minute."""
    if file.suffix != ".gguf":
        raise BaseError(f"base.path: {file} is a file; give the checkpoint's folder, or a GGUF file")
    folder = CACHE / f"{file.stem}-{_fingerprint(((file, file.stat().st_size, file.stat().st_mtime_ns),))}"
    made_once(folder, lambda unfinished: _write_checkpoint(file, unfinished), why="which unpacks the base")
    return folder


def _write_checkpoint(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer into a new folder."""
    try:
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
        config = type(loaded.config).from_dict(loaded.config.to_dict() | {"quantization_config": None})
        model = AutoModelForCausalLM.from_config(
            config
        )  # transformers refuses to save the loaded one: it counts as quantized
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except ImportError as error:
        raise BaseError(f"base.path: {file}: {error} (pip install gguf)") from None
    except (ValueError, OSError) as error:
        raise BaseError(f"base.path: {file} cannot be read: {error}") from None


def files_of(folder: Path, *, code: bool = False) -> list[Path]:
    """Returns the files of a checkpoint folder that loading needs, with its own `code` or without."""
    return sorted({file for pattern in needed(code=code) for file in folder.glob(pattern)})


def code_digest(folder: Path) -> str:
    """Returns 16 hex digits over a checkpoint's own code, which `fingerprint` leaves out: by default it does not run."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob(CODE)):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Returns 16 hex digits over all files that determine a base's answers (reads them all: about 1 s per GB).

    Weights, configuration, tokenizer, chat template, processor: the same files give the same digits in any folder.
    Raises BaseError that names a damaged file.
    """
    files = [file for file in files_of(folder) if any(fnmatch(file.name, pattern) for pattern in DECISIVE)]
    return _fingerprint(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hashes names and contents; sizes and times invalidate the cache when files change."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.name.encode())
        with stored_file(file, "copy or download the base again", BaseError):
            if file.name.endswith("config.json"):
                digest.update(_settings(file))
                continue
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if file.suffix == ".safetensors":
                safe_open(file, "pt").keys()  # checks the length, too
            with file.open("rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:16]


def _settings(file: Path) -> bytes:
    """Returns a configuration without its origin and version, which transformers adds when it saves."""
    values = json.loads(file.read_text(encoding="utf-8"), object_hook=_without_origin)
    return json.dumps(values, sort_keys=True).encode()


def _without_origin(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _ORIGIN}
