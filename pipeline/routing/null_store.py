"""Where the statistics of base prompts lie that pools refer to: a folder with a file for each, named by its digest.

Registered pools share it. What is missing or damaged is fetched, where the store knows from where, by one process while the
others wait; a file appears whole or not at all.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import StoredFileError, stored_file
from pipeline.locks import staging
from pipeline.routing.null import Components, LayerStatistics, read_null

REMEDY = (
    "load the pool from its registry, which fetches them (models:/<base>.pool.<name>@champion), or export it: `pointsman "
    "registry export NAME --format pool`"
)
"""What to do where statistics are not there, and nobody knows from where to fetch them."""

Fetch = Callable[[str, Path], None]
"""Copies the statistics of a digest to a file that is not there yet; raises a UserError where they cannot be had."""


class NullStore:
    """A folder of statistics of base prompts; `fetch` brings those that are missing or damaged."""

    def __init__(self, folder: Path, fetch: Fetch | None = None) -> None:
        self.folder, self.fetch = folder.resolve(), fetch

    def file_of(self, digest: str) -> Path:
        """Returns where statistics lie, or belong."""
        return self.folder / f"{digest}.safetensors"

    def load(self, digest: str) -> tuple[Components, LayerStatistics]:
        """Reads statistics, fetched if need be; raises StoredFileError, or what fetching raises."""
        file = self.file_of(digest)
        try:
            return _read(file, digest)
        except StoredFileError:
            if self.fetch is None:
                raise
        file.parent.mkdir(parents=True, exist_ok=True)
        with staging(file, why="which fetches the statistics of base prompts") as scratch:
            try:
                return _read(file, digest)  # another process was faster
            except StoredFileError:
                made = scratch / file.name
                self.fetch(digest, made)
                statistics = _read(made, digest)
                made.replace(file)
                return statistics


def _read(file: Path, digest: str) -> tuple[Components, LayerStatistics]:
    with stored_file(file, REMEDY):
        return read_null(file, digest)
