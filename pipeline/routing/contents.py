"""What a folder's files hold: size and digest of each in one small file beside them.

The digest of that file names the whole folder. Who knows it can tell a wrong or damaged folder without reading the large
files (`Contents.damage`), and a damaged file when it is read (`Contents.check`).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pipeline.config import Config

CONTENTS = "contents.json"


class FileContent(Config):
    """One file."""

    bytes: int
    sha256: str


class Contents(Config):
    """The files of a folder by name."""

    files: dict[str, FileContent]

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> "Contents":
        """Reads the files of these names."""
        return cls(files={name: _content(folder / name) for name in names})

    @classmethod
    def read(cls, folder: Path) -> "Contents | None":
        """Reads what `write` wrote; None for a folder of a release that did not. Raises ValueError where it is damaged."""
        file = folder / CONTENTS
        return cls.model_validate_json(file.read_text()) if file.exists() else None

    def write(self, folder: Path) -> None:
        """Writes the file beside those that it describes."""
        (folder / CONTENTS).write_text(self.model_dump_json(indent=2) + "\n")

    @cached_property
    def digest(self) -> str:
        """The name of all of it, 64 hex digits."""
        plain = self.model_dump(mode="json")
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def damage(self, folder: Path) -> str | None:
        """Returns what is wrong with a folder, as far as the sizes of its files tell."""
        for name, content in self.files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != content.bytes:
                return f"{name} is damaged: {size} bytes instead of {content.bytes}"
        return None

    def check(self, folder: Path, name: str) -> None:
        """Reads a file; raises ValueError where it does not hold what it should."""
        if name in self.files and _content(folder / name) != self.files[name]:
            raise ValueError(f"its bytes are not those that {CONTENTS} describes")


def _content(file: Path) -> FileContent:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return FileContent(bytes=opened.tell(), sha256=digest)
