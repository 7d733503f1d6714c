"""The pool: an ordered set of experts over one base with one router setting; what a user deploys."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.config import Config, RouterConfig
from pipeline.errors import UserError, stored_file
from pipeline.files import atomic_folder, current_folder
from pipeline.routing.expert import FORMAT_VERSION, Expert, check_versions
from pipeline.routing.features import FEATURE_RULE
from pipeline.routing.null import read_null, write_null
from pipeline.routing.statistics import PromptStatistics

CARD, NULL = "pool.json", "null.safetensors"
REMEDY = "copy the whole folder again, or learn the stream again"
"""What to do about a pool's damaged file."""


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
    experts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], ...] = ()
    """Names of the experts in order of arrival; each lies in `experts/<name>/`."""
    null: bool = False
    """Whether `null.safetensors` holds the statistics of general prompts."""
    format_version: int = FORMAT_VERSION
    """Version of the folder's files."""
    feature_rule: int = FEATURE_RULE
    """Version of the rule by which prompts became features."""


class Pool:
    """An ordered set of experts. Adding, replacing and removing makes a new pool and leaves this one as it is."""

    def __init__(
        self,
        base_label: str,
        base_fingerprint: str,
        router: RouterConfig,
        experts: Iterable[Expert] = (),
        null: Sequence[PromptStatistics] = (),
        null_evidence: Mapping[str, PromptStatistics] | None = None,
    ) -> None:
        self.base_label = base_label
        self.base_fingerprint = base_fingerprint
        self.router = router
        self.null = tuple(null)
        """Components of the general prompts; none where there is no general sample."""
        self.null_evidence = dict(null_evidence or {})
        self.experts: dict[str, Expert] = {}
        for expert in experts:
            self._check(expert)
            self.experts[expert.card.name] = expert

    def _check(self, expert: Expert) -> None:
        """Raises where `expert` does not fit those before it."""
        name = expert.card.name
        if expert.card.base_fingerprint != self.base_fingerprint:
            raise PoolError(
                f"expert {name!r} was trained on base {expert.card.base_fingerprint}, this pool's base is "
                f"{self.base_fingerprint}; use the base it was trained on, or train the task again"
            )
        expert.check_trained()
        for other in [*(e.statistics for e in self.experts.values()), *self.null]:
            if other.width != expert.statistics.width:
                raise PoolError(
                    f"expert {name!r} has {expert.statistics.width} prompt features, others have "
                    f"{other.width}; train all with the same router.feature_width"
                )

    @property
    def names(self) -> list[str]:
        """Names of the experts in order of arrival."""
        return list(self.experts)

    @property
    def width(self) -> int | None:
        """Number of prompt features F; None for an empty pool."""
        return next((expert.statistics.width for expert in self.experts.values()), None)

    @property
    def card(self) -> PoolCard:
        """The pool's description, as written to `pool.json`."""
        return PoolCard(
            base_label=self.base_label,
            base_fingerprint=self.base_fingerprint,
            router=self.router,
            experts=tuple(self.names),
            null=bool(self.null),
        )

    def _with(self, experts: Iterable[Expert], router: RouterConfig | None = None) -> "Pool":
        return Pool(
            self.base_label, self.base_fingerprint, router or self.router, experts, self.null, self.null_evidence
        )

    def add(self, expert: Expert) -> "Pool":
        """Returns the pool with `expert` at the end, or in its place if there is one of that name."""
        return self._with((self.experts | {expert.card.name: expert}).values())

    def remove(self, name: str) -> "Pool":
        """Returns the pool as if `name` had never been in it."""
        if name not in self.experts:
            raise PoolError(f"no expert {name!r} in the pool; there are: {', '.join(self.names) or 'none'}")
        return self._with(expert for other, expert in self.experts.items() if other != name)

    def routed_by(self, **settings: object) -> "Pool":
        """Returns the pool with other router settings, e.g. `routed_by(kind="token", temperature=0.5)`."""
        return self._with(self.experts.values(), RouterConfig.model_validate(self.router.model_dump() | settings))

    def save(self, folder: str | Path) -> Path:
        """Writes the pool with all its experts, all of it or nothing."""
        with atomic_folder(Path(folder)) as staging:
            (staging / "experts").mkdir()
            for name, expert in self.experts.items():
                expert.save(staging / "experts" / name)
            if self.null:
                write_null(staging / NULL, self.null, self.null_evidence)
            (staging / CARD).write_text(self.card.model_dump_json(indent=2) + "\n")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Pool":
        """Reads a pool folder; raises PoolError if it is none."""
        folder = current_folder(Path(folder))
        if not (folder / CARD).is_file():
            raise PoolError(
                f"{folder}: no {CARD}, so not a pool folder; `pointsman learn` writes one to runs/<name>/pool"
            )
        with stored_file(folder / CARD, REMEDY, PoolError):
            text = (folder / CARD).read_text()
            card = PoolCard.model_validate_json(text)
            check_versions(folder / CARD, json.loads(text))
        if card.null and not (folder / NULL).is_file():
            raise PoolError(f"{folder}: {NULL} is missing, which {CARD} says is there; copy the whole folder")
        experts = [Expert.load(folder / "experts" / name) for name in card.experts]
        if not card.null:
            return cls(card.base_label, card.base_fingerprint, card.router, experts)
        with stored_file(folder / NULL, REMEDY, PoolError):
            null, evidence = read_null(folder / NULL)
        return cls(card.base_label, card.base_fingerprint, card.router, experts, null, evidence)
