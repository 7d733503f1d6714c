"""What an exported folder says that it is, so that exporting again finds it complete, or something else in its place."""

from pathlib import Path

from pydantic import ValidationError

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.files import write_json

RECORD = "export.json"


class ExportError(UserError):
    """What cannot be exported, or not to that folder; the message names it and the remedy."""


class ExportRecord(Config):
    """What was exported."""

    format: str
    source: str
    """Version that it was made from, `<model>/<version>`."""
    base_name: str
    """What adapters call their base."""
    experts: dict[str, str]
    """Digests of the experts by name."""
    files: dict[str, int] = {}
    """Sizes of the files in bytes, by their paths in the folder."""

    def write(self, folder: Path) -> None:
        """Writes the record into a folder that is complete otherwise."""
        write_json(folder / RECORD, self.model_copy(update={"files": _sizes(folder)}).model_dump())

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds this export, complete; False for one that is empty or not there.

        Raises ExportError where it holds anything else.
        """
        if folder.exists() and not folder.is_dir():
            raise ExportError(f"--out: {folder} is a file; name a folder")
        if not folder.exists() or not any(folder.iterdir()):
            return False
        try:
            found = ExportRecord.model_validate_json((folder / RECORD).read_text())
        except (OSError, ValidationError):
            raise ExportError(f"--out: {folder} is not empty and no export; name another folder") from None
        if found.model_copy(update={"files": {}}) != self:
            raise ExportError(
                f"--out: {folder} holds another export ({found.format} of {found.source}, {len(found.experts)} experts); "
                "name another folder, or remove it"
            )
        there = _sizes(folder)
        if lost := [name for name, size in found.files.items() if there.get(name) != size]:
            raise ExportError(
                f"--out: {folder}: {lost[0]} is missing or was changed; remove the folder, and export again"
            )
        return True


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
