"""The pool: an ordered set of experts over one base with one router setting; what a user deploys.

A pool folder holds router settings, the statistics of base prompts, and references to experts that lie in a store (`store`);
an expert that lies in none, it holds itself. `Pool.export` writes a folder that holds them all, `Pool.refer` one that refers to
the statistics too (`null_store`).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

from pipeline.config import Config, RouterConfig
from pipeline.errors import UserError, stored_file
from pipeline.files import atomic_folder, current_folder, write_json
from pipeline.routing.adapters import ExpertError
from pipeline.routing.expert import Expert
from pipeline.routing.features import FEATURE_RULE
from pipeline.routing.null import Components, LayerStatistics, null_digest, read_null, write_null
from pipeline.routing.null_store import NullStore
from pipeline.routing.serialization import POOL_CARD, VERSIONS, OutdatedError, check_versions
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.store import (
    ExpertReference,
    ExpertStore,
    OwnExperts,
    StoredExpert,
    cache_folder,
    null_cache_folder,
)

CARD, NULL, EXPERTS = POOL_CARD, "null.safetensors", "experts"
REMEDY = "copy the whole folder again, or load the pool from its registry (models:/<base>.pool.<name>@champion)"
"""What to do about a pool's damaged file."""
POOL_FORMAT = 3
"""Version of what a pool's files hold. Version 2 had names in place of references, and always held the experts."""
REFERRING = 4
"""Version of a folder that holds its card alone: it refers to statistics of base prompts too, and briefly to experts."""


class PoolError(UserError):
    """An expert that does not fit the pool, or a pool folder that is incomplete."""


class PoolCard(Config):
    """What `pool.json` says."""

    base_label: str
    """Name of the base in the registry."""
    base_fingerprint: str
    """Fingerprint of the base's weights; experts of another base are refused."""
    router: RouterConfig
    """Router settings."""
    experts: tuple[ExpertReference, ...] = ()
    """The experts in order of arrival; each lies in `experts/<name>/`, or in a store."""
    retired: tuple[str, ...] = ()
    """Names of experts that answer no more: the base answers the prompts that resemble their tasks."""
    store: str | None = None
    """Folder of the store, relative to the pool's, where they lay when the folder was written."""
    width: int | None = None
    """Number of prompt features F; None for an empty pool, and in folders of earlier releases."""
    null: bool = False
    """Whether it has statistics of base prompts, in `null.safetensors` or in a store."""
    null_digest: str | None = None
    """Which (`null.null_digest`); None in folders of earlier releases, which hold them."""
    format_version: int = POOL_FORMAT
    """Version of the folder's files."""
    feature_rule: int = FEATURE_RULE
    """Version of the rule by which prompts became features."""

    @classmethod
    def read(cls, folder: Path) -> "PoolCard":
        """Reads a pool folder's card; raises PoolError if it is none."""
        if not (folder / CARD).is_file():
            raise PoolError(
                f"{folder}: no {CARD}, so not a pool folder; `pointsman learn` writes one to runs/<name>/pool"
            )
        with stored_file(folder / CARD, REMEDY, PoolError):
            fields = json.loads((folder / CARD).read_text())
            known = fields.get("format_version") in (POOL_FORMAT, REFERRING)
            same = {"format_version": VERSIONS["format_version"]} if known else {}
            check_versions(folder / CARD, fields | same)
            return cls.model_validate(fields)

    def continues(self, other: "PoolCard") -> bool:
        """Whether this pool is the `other`, or that and experts that came after."""
        begun = self.model_copy(update={"experts": self.experts[: len(other.experts)]})
        return begun.model_dump(exclude={"store"}) == other.model_dump(exclude={"store"})


class Experts(Mapping[str, Expert]):
    """The experts of a pool by name, in order of arrival; one that lies in a store is read when it is looked up."""

    def __init__(self, entries: Mapping[str, Expert | StoredExpert]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Expert:
        entry = self.entries[name]
        return entry.expert if isinstance(entry, StoredExpert) else entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Pool:
    """An ordered set of experts. Adding, replacing and removing makes a new pool and leaves this one as it is."""

    def __init__(
        self,
        base_label: str,
        base_fingerprint: str,
        router: RouterConfig,
        experts: Iterable[Expert | StoredExpert] = (),
        null: Sequence[PromptStatistics] = (),
        null_layer_statistics: Mapping[str, PromptStatistics] | None = None,
    ) -> None:
        self.base_label = base_label
        self.base_fingerprint = base_fingerprint
        self.router = router
        self.null = tuple(null)
        """Components of the base prompts; none where there is no base prompts."""
        self.null_layer_statistics = dict(null_layer_statistics or {})
        self.retired: tuple[str, ...] = ()
        """Experts whose prompts the base answers."""
        self._width: int | None = None
        self.experts = Experts({})
        for expert in experts:
            self.experts = self.add(expert).experts

    def _check(self, expert: Expert) -> None:
        """Raises where `expert` does not fit the pool."""
        name, width = expert.card.name, expert.statistics.width
        if expert.card.base_fingerprint != self.base_fingerprint:
            raise PoolError(
                f"expert {name!r} was trained on base {expert.card.base_fingerprint}, this pool's base is "
                f"{self.base_fingerprint}; use the base it was trained on, or train the task again"
            )
        alone = set(self.experts) <= {name}  # the one whose place it takes does not count
        for other in (None if alone else self.width, *(component.width for component in self.null)):
            if other not in (None, width):
                raise PoolError(
                    f"expert {name!r} has {width} prompt features, others have "
                    f"{other}; `pointsman recompute-statistics` with one router.feature_width gives all the same"
                )

    @property
    def names(self) -> list[str]:
        """Names of the experts in order of arrival."""
        return list(self.experts)

    @property
    def digests(self) -> list[str]:
        """What each expert was computed from (`ExpertCard.config_digest`), in order of arrival.

        Experts that lie in a store are not read for it.
        """
        references = ((name, _reference_of(entry).digest) for name, entry in self.experts.entries.items())
        return [digest or self.experts[name].card.config_digest for name, digest in references]

    @property
    def width(self) -> int | None:
        """Number of prompt features F; None for an empty pool."""
        if self._width is None:
            self._width = next((expert.statistics.width for expert in self.experts.values()), None)
        return self._width if self.experts else None

    @property
    def card(self) -> PoolCard:
        """The pool's description, as written to `pool.json`."""
        return self._card([_reference_of(entry) for entry in self.experts.entries.values()])

    def _card(self, references: Sequence[ExpertReference], store: str | None = None) -> PoolCard:
        return PoolCard(
            base_label=self.base_label,
            base_fingerprint=self.base_fingerprint,
            router=self.router,
            experts=tuple(references),
            retired=self.retired,
            store=store,
            width=self.width,
            null=bool(self.null),
            null_digest=self._null_digest,
        )

    @cached_property
    def _null_digest(self) -> str | None:
        return null_digest(self.null, self.null_layer_statistics) if self.null else None

    def _with(self, entries: Mapping[str, Expert | StoredExpert]) -> "Pool":
        pool = copy(self)
        pool.experts = Experts(entries)
        pool.retired = tuple(name for name in self.retired if entries.get(name) is self.experts.entries[name])
        return pool

    def add(self, expert: Expert | StoredExpert) -> "Pool":
        """Returns the pool with `expert` at the end, or in its place if there is one of that name.

        Looks at this expert alone, whatever the pool holds: raises PoolError where it does not fit, ExpertError where it was
        never trained (one in a store was checked when it was put there).
        """
        if isinstance(expert, Expert):
            expert.check_trained()
            expert_read = expert
        else:
            expert_read = expert.read()
        self._check(expert_read)
        pool = self._with(self.experts.entries | {expert_read.card.name: expert})
        pool._width = expert_read.statistics.width
        return pool

    def retire(self, name: str) -> "Pool":
        """Returns the pool with the base in place of expert `name`; who answers other prompts stays as it is.

        The prompt router goes on to tell the task's prompts from all others, so no other task gets them. Where every Linear
        chooses (`token`) there is no such place to stand in, and the expert is removed.
        """
        self._check_has(name)
        if name in self.retired:
            raise PoolError(f"expert {name!r} is retired already")
        if self.router.kind == "token":
            return self.remove(name)
        pool = copy(self)
        pool.retired = (*self.retired, name)
        return pool

    def _check_has(self, name: str) -> None:
        if name not in self.experts:
            raise PoolError(f"no expert {name!r} in the pool; there are: {', '.join(self.names) or 'none'}")

    def remove(self, name: str) -> "Pool":
        """Returns the pool as if `name` had never been in it."""
        self._check_has(name)
        return self._with({other: entry for other, entry in self.experts.entries.items() if other != name})

    def routed_by(self, **settings: object) -> "Pool":
        """Returns the pool with other router settings, e.g. `routed_by(kind="token", temperature=0.5)`."""
        pool = copy(self)
        pool.router = RouterConfig.model_validate(self.router.model_dump() | settings)
        return pool

    def kept_in(self, store: ExpertStore) -> "Pool":
        """Returns the pool with the experts that its folder holds in `store` instead, so that the folder may go.

        Raises PoolError where one of them is damaged.
        """
        pool = copy(self)
        pool.experts = Experts({name: _kept_in(store, entry) for name, entry in self.experts.entries.items()})
        return pool

    def save(self, folder: str | Path) -> Path:
        """Writes the pool, all of it or nothing: references to experts in a store, and the experts that lie in none."""
        return self._write(Path(folder), next(filter(None, map(_store_of, self.experts.entries.values())), None))

    def export(self, folder: str | Path, on_expert: Callable[[str], None] = lambda name: None) -> Path:
        """Writes a folder that holds the experts too, and checks all of their files: nothing else is needed to use it.

        `on_expert` hears the name of each expert when its turn comes.
        """
        return self._write(Path(folder), None, on_expert)

    def refer(self, folder: str | Path, references: Mapping[str, ExpertReference]) -> Path:
        """Writes a folder that holds nothing but the card: `references` give the experts' places by name. Reads none of them.

        Whoever loads it needs a store of the statistics of base prompts, where `card.null_digest` names them.
        """
        with atomic_folder(Path(folder)) as staging:
            referred = [references[name] for name in self.names]
            fields = self._card(()).model_dump(mode="json") | {"format_version": REFERRING}
            fields["experts"] = [reference.short for reference in referred]
            write_json(staging / CARD, fields)
        return Path(folder)

    def _write(
        self, folder: Path, store: ExpertStore | None, on_expert: Callable[[str], None] = lambda name: None
    ) -> Path:
        """Writes the folder with all experts but those that lie in `store`."""
        with atomic_folder(folder) as staging:
            references = []
            for name, entry in self.experts.entries.items():
                on_expert(name)
                own_folder = staging / EXPERTS / name
                if isinstance(entry, Expert):
                    references.append(ExpertReference.of(entry.save(own_folder)))
                elif store is not None and _store_of(entry) is store:
                    references.append(entry.reference)
                else:
                    own_folder.parent.mkdir(exist_ok=True)
                    entry.store.copy(entry.reference, own_folder)
                    fields = entry.reference.model_dump(exclude_none=True)
                    references.append(ExpertReference.of(own_folder).model_copy(update=fields))
            if self.null:
                write_null(staging / NULL, self.null, self.null_layer_statistics)
            there = None if store is None else os.path.relpath(store.folder, folder.resolve())
            card = self._card(references, there)
            # Releases that know no retired experts read all other pools.
            text = card.model_dump_json(indent=2, exclude=None if card.retired else {"retired"})
            (staging / CARD).write_text(text + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path, store: ExpertStore | None = None, nulls: NullStore | None = None) -> "Pool":
        """Reads a pool folder; raises PoolError if it is none. An expert is read when it is looked up.

        Experts that the folder does not hold lie in `store`; by default where they lay when the folder was written, or, where
        that is not here, in the user's cache (`store.cache_folder`). Statistics of base prompts that it does not hold lie in
        `nulls`; by default in that cache.
        """
        folder = current_folder(Path(folder))
        card = PoolCard.read(folder)
        null, layer_statistics = _null_of(folder, card, nulls)
        if store is None:
            there = (folder / card.store).resolve() if card.store is not None else None
            store = ExpertStore(there if there is not None and there.is_dir() else cache_folder())
        contained = OwnExperts(folder / EXPERTS)
        pool = cls(card.base_label, card.base_fingerprint, card.router, (), null, layer_statistics)._with({
            reference.name: StoredExpert(reference, contained if _held(reference, contained) else store)
            for reference in card.experts
        })  # fmt: skip
        pool._width, pool.retired = card.width, card.retired
        return pool


def _null_of(folder: Path, card: PoolCard, nulls: NullStore | None) -> tuple[Components, LayerStatistics]:
    """Reads the statistics of base prompts of a pool's folder; none where it has none."""
    if not card.null:
        return (), {}
    file = folder / NULL
    if not file.is_file() and card.format_version == REFERRING and card.null_digest is not None:
        return (nulls or NullStore(null_cache_folder())).load(card.null_digest)
    if not file.is_file():
        raise PoolError(f"{folder}: {NULL} is missing, which {CARD} says is there; copy the whole folder")
    with stored_file(file, REMEDY, PoolError):
        return read_null(file, card.null_digest)


def _held(reference: ExpertReference, contained: OwnExperts) -> bool:
    return reference.digest is None or contained.folder_of(reference).is_dir()


def _kept_in(store: ExpertStore, entry: Expert | StoredExpert) -> Expert | StoredExpert:
    if not isinstance(entry, StoredExpert) or not isinstance(entry.store, OwnExperts):
        return entry
    try:
        folder = entry.store.ensure(entry.reference)
        fields = entry.reference.model_dump(exclude_none=True)
        reference = ExpertReference.of(folder).model_copy(update=fields)
        store.take(reference, folder)
    except OutdatedError:
        raise
    except ExpertError as error:
        raise PoolError(str(error)) from None
    return StoredExpert(reference, store)


def _store_of(entry: Expert | StoredExpert) -> ExpertStore | None:
    """Returns the store that a pool may refer to for an expert; None where the pool must hold it."""
    return entry.store if isinstance(entry, StoredExpert) and not isinstance(entry.store, OwnExperts) else None


def _reference_of(entry: Expert | StoredExpert) -> ExpertReference:
    if isinstance(entry, StoredExpert):
        return entry.reference
    return ExpertReference(name=entry.card.name, digest=entry.card.config_digest)
