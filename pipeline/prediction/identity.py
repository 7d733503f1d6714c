"""What a folder of answers holds answers to, and the one process that fills it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import PredictConfig, SourceConfig, is_address, without_secrets
from pipeline.data.sources.files import matches, split_glob
from pipeline.data.sources.reader import fingerprint
from pipeline.errors import stored_file
from pipeline.files import write_json
from pipeline.locks import LockedError, file_lock
from pipeline.prediction.errors import PredictError
from pipeline.prediction.parts import Parts
from pipeline.prediction.pool_source import PoolSource

IDENTITY = "predict.json"
"""File that says what the answers depend on."""

DEMO = "data"
"""Folder of the demo's files, where they are the source."""


def identity_of(config: PredictConfig, pool: PoolSource, folder: Path) -> dict[str, Any]:
    """Returns what the answers depend on: not by how many workers, on which devices, in how large batches."""
    source = config.source.model_dump(exclude_defaults=True, exclude={"cache"})
    identity = {
        "pool": pool.digest,
        "base settings": pool.settings(),
        "rows": fingerprint(config.source, folder / DEMO),
        "source": source | {"path": without_secrets(config.source.path)},
        "prompt": config.prompt,
        "told": config.told,
        "data": config.data.model_dump(include={"max_tokens", "max_pixels"}),
        "max_new_tokens": config.evaluation.max_new_tokens,
        "rows_per_part": config.rows_per_part,
    }
    return dict(json.loads(json.dumps(identity)))


def check_apart(source: SourceConfig, folder: Path) -> None:
    """Raises PredictError where the files of answers would be read as rows when the same command goes on."""
    base, pattern = split_glob(source.path)
    if is_address(base) or not Path(base).is_dir() or not folder.is_relative_to(Path(base).resolve()):
        return
    inside = folder.relative_to(Path(base).resolve()).parts
    written = (Parts(folder).file(0).name,), ("quarantine", Parts(folder).quarantine(0).name), (IDENTITY,)
    if any(matches(pattern, [*inside, *names]) for names in written) and not any(
        part.startswith((".", "_")) for part in inside
    ):
        raise PredictError(
            f"OUT: {folder} lies among the rows ({source.path}), so that answers would be read as rows next time; choose a "
            "folder elsewhere"
        )


def claim(folder: Path, identity: dict[str, Any], *, begun: bool) -> None:
    """Notes what the folder holds answers to; raises PredictError where it holds (`begun`) others."""
    file = folder / IDENTITY
    if not begun:
        write_json(file, identity)
        return
    with stored_file(file, f"choose another folder than {folder}, or empty it"):
        before = json.loads(file.read_text())
    if changed := [key for key, value in identity.items() if before.get(key) != value]:
        raise PredictError(
            f"{folder}: it holds answers with another {' and another '.join(changed)}: {_shown(before, changed)}, now "
            f"{_shown(identity, changed)}; choose another folder, or empty this one"
        )


def _shown(identity: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(str(identity.get(key))[:120] for key in keys)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be, for this process; raises PredictError if another one has it."""
    try:
        with file_lock(folder / "predict.lock", wait=False):
            yield
    except LockedError as error:
        raise PredictError(
            f"{folder}: {error.holder} writes answers there; wait for its end, or choose another folder"
        ) from None
