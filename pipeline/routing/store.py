"""Where the experts lie that pools refer to: a folder with a sub-folder per expert, named by its digest.

Runs and processes share it. What is missing or damaged is fetched, where the store knows from where, by one process while the
others wait; an expert appears whole or not at all. Nothing is read before it is needed, so that a pool of a thousand experts
opens at once.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open

from pipeline.config import Config
from pipeline.files import current_folder, replace_folder, user_cache
from pipeline.locks import staging
from pipeline.routing.adapters import ADAPTER_WEIGHTS, ExpertError
from pipeline.routing.contents import CONTENTS, Contents
from pipeline.routing.expert import CARD, FILES, ROUTER_WEIGHTS, Expert, ExpertCard, check_file

CACHE_VARIABLE = "POINTSMAN_EXPERTS"
"""Environment variable that names another folder than the user's cache for what registered pools refer to."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""A name, or a digest, that is a folder's name too: no part of a path."""


class ExpertReference(Config):
    """What a pool says of an expert instead of holding it."""

    name: Name
    """Name of the expert, that of its task."""
    digest: Name | None = None
    """Digest of what it was computed from (`ExpertCard.config_digest`); None in pools of earlier releases, which hold it."""
    content: str | None = None
    """Digest of its files (`Contents.digest`); None for an expert of a release that did not record it."""
    model: str | None = None
    """Registered model that holds it."""
    version: int | None = None
    """Its version there."""

    @classmethod
    def of(cls, folder: Path) -> "ExpertReference":
        """Refers to the expert in a folder, without a version."""
        card, contents = ExpertCard.model_validate_json((folder / CARD).read_text()), Contents.read(folder)
        return cls(name=card.name, digest=card.config_digest, content=contents.digest if contents else None)

    @property
    def short(self) -> str | dict[str, Any]:
        """What a registered pool writes, which may refer to hundreds: `<model>/<version> <digest> <content>`.

        The fields by name where one is missing, or where the model's name does not end with the expert's.
        """
        parts = (self.model, self.version, self.digest, self.content)
        if None in parts or str(self.model).rpartition(".")[2] != self.name:
            return self.model_dump(exclude_none=True)
        return f"{self.model}/{self.version} {self.digest} {self.content}"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Reads the short form; a name alone is all that pools of earlier releases say of an expert that they hold."""
        if not isinstance(value, str):
            return value
        if "/" not in value:
            return {"name": value}
        (address, digest, content) = value.split(" ")
        model, _, version = address.partition("/")
        name = model.rpartition(".")[2]
        return {"name": name, "digest": digest, "content": content, "model": model, "version": int(version)}

    def __str__(self) -> str:
        version = f", version {self.version} of {self.model}" if self.version is not None else ""
        return f"expert {self.name!r} (digest {self.digest or 'unknown'}{version})"

    def damage(self, folder: Path) -> str | None:
        """Returns why a folder does not hold this expert, as far as its card and the sizes of its files tell."""
        for name in FILES:
            if not (folder / name).is_file():
                return f"{name} is missing" if folder.is_dir() else "it is not there"
        try:
            card, contents = ExpertCard.model_validate_json((folder / CARD).read_text()), Contents.read(folder)
        except ValueError:
            return f"{CARD} or the list of its contents is damaged"
        if card.name != self.name or self.digest not in (None, card.config_digest):
            return f"it is expert {card.name!r} with digest {card.config_digest}"
        if self.content is not None and (contents is None or contents.digest != self.content):
            return "its files are not those that were registered"
        return contents.damage(folder) if contents else _broken(folder)


def _broken(folder: Path) -> str | None:
    """Returns which of an earlier release's large files is cut off."""
    for name in (ADAPTER_WEIGHTS, ROUTER_WEIGHTS):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} is damaged ({error})"
    return None


Fetch = Callable[[ExpertReference, Path], None]
"""Copies an expert into a folder that is not there yet; raises a UserError where it cannot be had."""


class ExpertStore:
    """A folder of experts; `fetch` brings those that are missing or damaged, `keep` hears of each that has come in."""

    def __init__(
        self, folder: Path, fetch: Fetch | None = None, *, keep: Callable[[ExpertReference], None] | None = None
    ) -> None:
        self.folder, self.fetch, self.keep = folder.resolve(), fetch, keep

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: it reads what is there, and does not fetch, which may take what only this one has."""
        return self.__dict__ | {"fetch": None, "keep": None}

    def folder_of(self, reference: ExpertReference) -> Path:
        """Returns where an expert lies, or belongs."""
        assert reference.digest is not None, "only pools that hold their experts do not name digests"
        return self.folder / reference.digest

    def has(self, reference: ExpertReference) -> bool:
        """Whether an expert is there, as far as its card and the sizes of its files tell."""
        return reference.damage(current_folder(self.folder_of(reference))) is None

    def put(self, expert: Expert) -> Path:
        """Writes an expert, unless one of its digest is there undamaged; returns its folder.

        Raises ExpertError for one that was never trained.
        """
        expert.check_trained()
        reference = ExpertReference(name=expert.card.name, digest=expert.card.config_digest)
        self._make(reference, expert.save, read=FILES)
        return self.folder_of(reference)

    def take(self, reference: ExpertReference, folder: Path) -> Path:
        """Copies an expert's folder that lies elsewhere, unless it is here undamaged; returns its folder here.

        Raises ExpertError where that folder is incomplete, damaged, another expert's, or of one that was never trained.
        """

        def copy(made: Path) -> None:
            Expert.load(folder).check_trained()  # reads all of its files
            _copy(current_folder(folder), made)

        self._make(reference, copy, read=FILES)
        return self.folder_of(reference)

    def ensure(self, reference: ExpertReference) -> Path:
        """Returns the folder of an expert, fetched if need be; raises ExpertError, or what fetching raises."""
        if not self.has(reference):
            self._fetch(reference)
        return current_folder(self.folder_of(reference))

    def load(self, reference: ExpertReference) -> Expert:
        """Reads an expert, fetched if need be; a file that turns out to be damaged is fetched again."""
        return Expert.load(self.ensure(reference), check=partial(self._check, reference))

    def verify(self, reference: ExpertReference) -> Path:
        """Returns the folder of an expert after reading all of its files, fetched where missing or damaged."""
        self.ensure(reference)
        for name in FILES:
            self._check(reference, name)
        return current_folder(self.folder_of(reference))

    def copy(self, reference: ExpertReference, folder: Path) -> None:
        """Copies an expert to a folder that is not there yet, and checks all of its files."""
        _copy(self.verify(reference), folder)

    def _check(self, reference: ExpertReference, name: str) -> None:
        folder = current_folder(self.folder_of(reference))
        try:
            check_file(folder, name)
        except ExpertError as error:
            if self.fetch is None:
                raise ExpertError(f"{reference}: {error}") from None
            self._fetch(reference, read=[name])

    def _fetch(self, reference: ExpertReference, *, read: Sequence[str] = ()) -> None:
        if self.fetch is None:
            folder = self.folder_of(reference)
            raise ExpertError(
                f"{reference}: missing or damaged in {folder}: {reference.damage(current_folder(folder))}; copy that folder "
                "here, load the pool from its registry, which fetches it (models:/<base>.pool.<name>@champion), or run "
                "`pointsman learn` again"
            )
        fetch = self.fetch

        def fetched(made: Path) -> None:
            fetch(reference, made)
            for name in read:
                if (damage := _damaged(made, name)) is not None:
                    raise _wrong(reference, damage)

        self._make(reference, fetched, read=read)

    def _make(self, reference: ExpertReference, make: Callable[[Path], object], *, read: Sequence[str] = ()) -> None:
        """Has `make` write an expert's folder, unless it is there and the files `read` are undamaged."""
        folder = self.folder_of(reference)
        with staging(folder, why=f"which writes {reference}") as scratch:
            there = self.has(reference) and not any(_damaged(current_folder(folder), name) for name in read)
            if not there:  # else another process was faster
                made = scratch / folder.name
                make(made)
                if (damage := reference.damage(made)) is not None:
                    raise _wrong(reference, damage)
                replace_folder(made, folder)
        if self.keep is not None:
            self.keep(reference)


def _copy(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    if (source / CONTENTS).exists():
        shutil.copyfile(source / CONTENTS, folder / CONTENTS)


def _wrong(reference: ExpertReference, damage: str) -> ExpertError:
    return ExpertError(
        f"{reference}: what was fetched is not that: {damage}; bring its files back in the registry, or use a version of the "
        "pool without it"
    )


def _damaged(folder: Path, name: str) -> str | None:
    """Returns what is wrong with a file after reading it; None where nothing is."""
    try:
        check_file(folder, name)
    except ExpertError as error:
        return str(error).replace(f"{folder}/", "").partition(";")[0]
    return None


class OwnExperts(ExpertStore):
    """The experts inside a pool's folder, by name."""

    def folder_of(self, reference: ExpertReference) -> Path:
        """Returns where an expert lies."""
        return self.folder / reference.name

    def load(self, reference: ExpertReference) -> Expert:
        """Reads an expert; raises ExpertError where it is not the one that the pool says, or damaged."""
        expert = Expert.load(self.folder_of(reference))
        self.ensure(reference)
        return expert

    def _fetch(self, reference: ExpertReference, *, read: Sequence[str] = ()) -> None:
        folder = self.folder_of(reference)
        raise ExpertError(f"{folder}: {reference.damage(folder)}; copy the whole folder again")


@dataclass(frozen=True, eq=False)
class StoredExpert:
    """An expert in a store, not read before it is needed."""

    reference: ExpertReference
    store: ExpertStore

    @cached_property
    def expert(self) -> Expert:
        """The expert, which stays in memory from now on: its card and statistics, not its adapters."""
        return self.store.load(self.reference)

    def registered_as(self, model: str, version: int) -> "StoredExpert":
        """Returns the same expert with its place in the registry."""
        registered = replace(self, reference=self.reference.model_copy(update={"model": model, "version": version}))
        if "expert" in self.__dict__:
            registered.__dict__["expert"] = self.expert
        return registered

    def read(self) -> Expert:
        """Returns the expert without keeping it in memory."""
        return self.__dict__.get("expert") or self.store.load(self.reference)


def same_expert(one: Expert | StoredExpert, other: Expert | StoredExpert) -> bool:
    """Whether two entries of pools are the same expert, by what their folders hold."""
    if isinstance(one, StoredExpert) and isinstance(other, StoredExpert) and one.reference.content is not None:
        return one.reference.content == other.reference.content
    return one is other


def cache_folder() -> Path:
    """Returns the folder of experts that this user's registered pools share: $POINTSMAN_EXPERTS, or in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser()
    return user_cache("experts")


def null_cache_folder() -> Path:
    """Returns the folder of the statistics of base prompts that this user's registered pools share, among their experts."""
    return cache_folder() / "base_prompts"
