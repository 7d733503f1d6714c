"""What a submitted job gets as its working directory: one archive of exactly the files that it needs.

The code of this project, so that the head needs an environment with its dependencies but no checkout and no certain version;
the configuration; the local files that it names. Nothing else of the folder in which a job is submitted leaves it.
"""

import os
import stat
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from pipeline.errors import UserError

MIB = 1 << 20

LARGEST = 100 * MIB
"""Bytes of the largest package that a Ray head takes: its job server reads no longer request."""

SHOWN = 5
"""Largest files that are named where a package is refused."""

CODE = ("pipeline", "jobs", "cluster", "tuning")
"""The packages of this project."""

LEFT_OUT = (".png", ".md", ".pyc")
"""Endings of what lies beside code and is not run."""

ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
"""What a folder holds that is an environment."""

FOLDERS_LEFT_OUT = {"__pycache__", "node_modules", "mlruns", "mlartifacts"}
"""Folders that are never meant, beside hidden ones and environments."""

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of all files in an archive: the same content has the same name, and is not sent twice."""


class PackageError(UserError):
    """The package is too large, or a file of it cannot be read; the message names the largest files, and the remedy."""


class Package:
    """Files by their place in the job's working directory."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Path, int]] = {}
        self._written: dict[str, tuple[bytes, int]] = {}

    def add(self, source: Path, place: str) -> None:
        """Adds a file, or a folder without environments, caches and hidden files."""
        if source.is_dir():
            for file in files_below(source):
                self.add(file, f"{place}/{file.relative_to(source)}")
            return
        self._files[place] = source, source.stat().st_size

    def write(self, place: str, content: bytes, *, mode: int = 0o644) -> None:
        """Adds a file with this content, which is written nowhere else."""
        self._written[place] = content, mode

    def add_code(self) -> None:
        """Adds this project's own code, and the note by which Python knows its version."""
        for name in CODE:
            spec = find_spec(name)
            assert spec is not None, "this is one of them"
            assert spec.submodule_search_locations is not None, "they are folders"
            root = Path(next(iter(spec.submodule_search_locations)))
            for file in files_below(root):
                if file.suffix not in LEFT_OUT:
                    self.add(file, f"{name}/{file.relative_to(root)}")
        try:
            installed = distribution("pointsman")
        except PackageNotFoundError:  # run from a checkout that is not installed
            return
        metadata = installed.read_text("METADATA") or ""
        self.write(f"pointsman-{installed.version}.dist-info/METADATA", metadata.encode())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its place."""
        return {place: size for place, (_, size) in self._files.items()} | {
            place: len(content) for place, (content, _) in self._written.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def check(self, limit: int) -> None:
        """Raises PackageError where the files exceed `limit` bytes."""
        if self.bytes <= limit:
            return
        largest = sorted(self.sizes.items(), key=lambda item: -item[1])[:SHOWN]
        named = "".join(
            f"\n    {size / MIB:9.1f} MiB  {self._files[p][0] if p in self._files else p}" for p, size in largest
        )
        raise PackageError(
            f"the job's files take {self.bytes / MIB:.1f} MiB, more than --package-limit {limit / MIB:g}MiB; put large data "
            "where the cluster reads it and name it by its absolute path or URI there (s3://, gs://, a mounted folder); the "
            f"largest:{named}"
        )

    def archive(self, target: Path) -> int:
        """Writes the archive, readable by this user alone; returns its size in bytes."""
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with (
            os.fdopen(descriptor, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zipped,
        ):
            for place in sorted(self.sizes):
                entry = zipfile.ZipInfo(place, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                if place in self._written:
                    content, mode = self._written[place]
                else:
                    content, mode = _content(self._files[place][0]), 0o644
                entry.external_attr = (stat.S_IFREG | mode) << 16
                zipped.writestr(entry, content)
        if (size := target.stat().st_size) > LARGEST:
            raise PackageError(
                f"the package has {size / MIB:.1f} MiB, and a Ray head takes {LARGEST / MIB:g}; put large data where the "
                "cluster reads it and name it by its absolute path or URI there"
            )
        return size


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PackageError(f"{file}: cannot be read: {error.strerror}") from None


def files_below(folder: Path, *above: Path) -> Iterator[Path]:
    """Yields the files of a folder in order, without hidden ones, environments and caches.

    `above` are the folders that it lies in: a link back to one of them leads nowhere new.
    """
    here = folder.resolve()
    if here in above:
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.name not in FOLDERS_LEFT_OUT and not any((entry / mark).exists() for mark in ENVIRONMENT_MARKS):
                yield from files_below(entry, here, *above)
        elif entry.is_file():
            yield entry


def bytes_of(text: str) -> int:
    """Returns the bytes that a text like `80MiB`, `80MB` or `80000000` says; raises PackageError for anything else."""
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise PackageError(f"--package-limit {text}: write it like 80MiB") from None
    if size <= 0:
        raise PackageError(f"--package-limit {text}: nothing could be sent; write it like 80MiB")
    if size > LARGEST:
        raise PackageError(f"--package-limit {text}: a Ray head takes at most {LARGEST / MIB:g}MiB")
    return size
