"""A folder of this machine, and what of it lies at an address; without an address, simply the folder.

What is written here is copied there, what is missing here is copied from there. Nodes that share no file system see the same
files through the address, each in a folder of its own.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow.fs as fs

from pipeline.locks import made_once
from pipeline.storage.remote import RemoteFolder, at_once


@dataclass(frozen=True)
class Mirror:
    """A folder here, and its address, if it has one."""

    local: Path
    remote: RemoteFolder | None = None

    @classmethod
    def of(cls, folder: "Folder") -> "Mirror":
        """Returns the folder itself where it is a mirror; a path has no address."""
        return folder if isinstance(folder, Mirror) else cls(folder)

    def __truediv__(self, name: str) -> "Mirror":
        return Mirror(self.local / name, None if self.remote is None else self.remote / name)

    def at(self, path: Path) -> "Mirror":
        """Returns the mirror of a folder below this one, or of a folder elsewhere, which has no address."""
        if self.remote is None or not path.is_relative_to(self.local):
            return Mirror(path)
        return self / path.relative_to(self.local).as_posix()

    def __str__(self) -> str:
        return str(self.local if self.remote is None else self.remote)

    @property
    def filesystem(self) -> fs.FileSystem:
        """Where all nodes find its files: the file system of its address, or this machine's."""
        return fs.LocalFileSystem() if self.remote is None else self.remote.filesystem

    @property
    def path(self) -> str:
        """Its path there."""
        return str(self.local) if self.remote is None else self.remote.path

    @property
    def uri(self) -> str:
        """Its address, which may hold keys, or its path."""
        return str(self.local) if self.remote is None else self.remote.uri

    def exists(self, name: str) -> bool:
        """Whether all nodes find a file of this name."""
        return (self.local / name).is_file() if self.remote is None else self.remote.exists(name)

    def folders(self) -> list[str]:
        """Returns the names of the folders that lie in it, where all nodes find them."""
        if self.remote is not None:
            return self.remote.folders()
        return sorted(path.name for path in self.local.iterdir() if path.is_dir()) if self.local.is_dir() else []

    def share(self, name: str = "", *, last: str = "") -> None:
        """Copies a file or folder of here to the address, the file `last` after all others; nothing without an address."""
        if self.remote is None:
            return
        source = self.local / name
        if source.is_file():
            self.remote.upload(source, name)
        else:
            (self.remote / name).upload_folder(source, last=last)

    def fetched(self, name: str) -> Path:
        """Returns the path here of a file or folder; copied from the address if it is not here."""
        path = self.local / name
        if self.remote is not None and not path.exists():
            if self.remote.exists(name):
                self.remote.download(name, path)
            else:
                fetch_folder(self.remote / name, path)
        return path

    def delete(self, name: str) -> None:
        """Removes a folder, here and there."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        if self.remote is not None:
            (self.remote / name).delete_all()

    @contextmanager
    def on_this_node(self) -> Iterator["Mirror"]:
        """Yields the same folder for a process on any node: with an address, in a folder of its own that is gone afterwards."""
        if self.remote is None:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="pointsman-", ignore_cleanup_errors=True) as scratch:
            # The last two names stay: they say which run it is.
            yield Mirror(Path(scratch, *self.local.parts[-2:]), self.remote)


Folder = Path | Mirror
"""A folder that all nodes see, on a shared file system or through its address."""


def fetch_folder(remote: RemoteFolder, target: Path) -> None:
    """Copies a folder here, all of it or nothing; nothing where it holds no file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        staging = Path(scratch) / target.name
        remote.download_folder(staging)
        if staging.exists():
            staging.rename(target)


def made_by_all(
    folder: Folder, make: Callable[[fs.FileSystem, str], object], *, mark: str, why: str
) -> tuple[fs.FileSystem, str]:
    """Has `make` fill a folder from all nodes, unless it is complete; returns where the files are: file system and path.

    `make` gets the file system and path of an empty folder. The file `mark` is written last; at an address, where nothing can
    be renamed, it names the sub-folder in which the files are.
    """
    mirror = Mirror.of(folder)
    if mirror.remote is None:
        local = fs.LocalFileSystem()

        def make_here(unfinished: Path) -> None:
            make(local, str(unfinished))

        made_once(mirror.local, make_here, why=why, mark=mark)
        return local, str(mirror.local)
    if (place := made_at(mirror, mark)) is None:
        name = uuid4().hex
        make(mirror.filesystem, f"{mirror.path}/{name}")
        mirror.remote.write(mark, name.encode())
        place = mirror.filesystem, f"{mirror.path}/{name}"
    return place


def made_at(folder: Folder, mark: str) -> tuple[fs.FileSystem, str] | None:
    """Returns where the files of a complete folder are (see `made_by_all`); None while it is not complete."""
    mirror = Mirror.of(folder)
    if mirror.remote is None:
        return (fs.LocalFileSystem(), str(mirror.local)) if (mirror.local / mark).exists() else None
    name = mirror.remote.read(mark)
    return None if name is None else (mirror.filesystem, f"{mirror.path}/{name.decode()}")


GENERATION = "mirror.json"
"""File in a run's folder at its address that names the session which wrote there last."""

_NOTES = ".mirror.json"
"""File in a run's folder here: of which session it is, and what of it lies at the address."""


class RunMirror:
    """The folder of a run here, which one process writes, and its copy at an address.

    A session that begins takes what lies at the address, unless the last one there was on this machine: then what lies here is
    the same, or newer. Folders in `apart` are left to others.
    """

    def __init__(self, run: Mirror, *, apart: Sequence[str]) -> None:
        assert run.remote is not None, "else there is nothing to do"
        self._local, self._remote, self._apart = run.local, run.remote, tuple(apart)
        self._pushed: dict[str, list[int]] = {}
        self._session = ""

    def begin(self) -> None:
        """Brings the folder up to date, and marks it as this session's."""
        notes = _read(self._local / _NOTES)
        there = self._remote.read(GENERATION)
        if there is not None and there.decode() == notes.get("session"):
            self._pushed = notes.get("pushed", {})
        else:
            for file in self._files():
                file.unlink()
            names = [name for name in self._remote.files() if self._is_mine(name) and name != GENERATION]
            at_once(lambda name: self._remote.download(name, self._local / name), names)
            self._pushed = {name: _state(self._local / name) for name in names}
        self._session = uuid4().hex
        self._write_notes()
        self._remote.write(GENERATION, self._session.encode())

    def push(self) -> None:
        """Copies to the address what is new here, and deletes there what was deleted here.

        Files that others refer to come first: the summary last, and before it a pool's card.
        """
        found = {file.relative_to(self._local).as_posix(): file for file in self._files()}
        for name in sorted(found, key=_turn):
            try:
                state = _state(found[name])
                if self._pushed.get(name) != state:
                    self._remote.upload(found[name], name)
                    self._pushed[name] = state
            except FileNotFoundError:  # replaced or deleted meanwhile: the next time
                continue
        # Where even the notes are gone, somebody has cleared the cache of this machine.
        cleared = not (self._local / _NOTES).exists()
        gone = [] if cleared else [name for name in self._pushed if not (self._local / name).exists()]
        self._remote.delete(gone)
        for name in gone:
            del self._pushed[name]
        self._write_notes()

    def _files(self) -> list[Path]:
        if not self._local.is_dir():
            return []
        files = (file for file in self._local.rglob("*") if file.is_file())
        return [file for file in files if self._is_mine(file.relative_to(self._local).as_posix())]

    def _is_mine(self, name: str) -> bool:
        folder, *_ = parts = name.split("/")
        return folder not in self._apart and not any(
            part.startswith(".") or part.endswith((".lock", ".staging", ".old")) for part in parts
        )

    def _write_notes(self) -> None:
        file = self._local / _NOTES
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_suffix(".new")
        staging.write_text(json.dumps({"session": self._session, "pushed": self._pushed}))
        staging.replace(file)


_LAST = ("report.html", "pool.json", "summary.json")
"""Names of files that refer to others, in the order in which they are copied."""


def _turn(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    return (_LAST.index(last) + 1 if last in _LAST else 0), name


class SharedFiles:
    """A folder of files that never change, for all runs at an address: those that are asked for are copied, in both directions.

    What lies there is listed once. May be called from several threads.
    """

    def __init__(self, folder: Mirror) -> None:
        assert folder.remote is not None, "else there is nothing to do"
        self._local, self._remote = folder.local, folder.remote
        self._there: set[str] | None = None
        self._asked: set[str] = set()
        self._both: set[str] = set()
        """Files that were here and there: those that have gone here since, of which one was made, go there too."""
        self._lock = threading.Lock()

    def pull(self, name: str) -> None:
        """Copies what is not here yet of a file, or of a folder; only the first time."""
        with self._lock:
            if name in self._asked:
                return
            there = self._listed()
            wanted = {name} & there or {file for file in there if file.startswith(f"{name}/")}
            missing = [file for file in sorted(wanted) if not (self._local / file).exists()]
            at_once(lambda file: self._remote.download(file, self._local / file), missing)
            self._asked.add(name)
            self._both |= wanted

    def push(self) -> None:
        """Copies what was asked for and is not there yet; then deletes there what was compacted here."""
        with self._lock:
            there = self._listed()
            here = {file for name in self._asked for file in self._files(name) if not _is_hidden(file)}
            for file in sorted(here - there):
                try:
                    self._remote.upload(self._local / file, file)
                except FileNotFoundError:
                    continue
                there.add(file)
            # Where the whole folder is gone, somebody has cleared the cache of this machine.
            gone = [file for file in self._both - here if (self._local / file).parent.is_dir()]
            self._remote.delete(gone)
            there -= set(gone)
            self._both = here & there

    def _listed(self) -> set[str]:
        if self._there is None:
            self._there = {name for name in self._remote.files() if not _is_hidden(name)}
        return self._there

    def _files(self, name: str) -> list[str]:
        path = self._local / name
        found = path.rglob("*") if path.is_dir() else [path]
        return [file.relative_to(self._local).as_posix() for file in found if file.is_file()]


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".") or name.endswith(".lock")


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
