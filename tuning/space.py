"""The space of a sweep: which fields of a configuration are tried, with which values, under which conditions.

A file (see `jobs/configs/space.yaml`), or `--set FIELD=VALUES` on the command line. Everything is checked against the
configuration before anything starts: each value of a list, both ends of a range. Knows nothing of Ray until values are drawn.

- What trains an expert (`expert.*`, `router.steps`, `router.learning_rate`, `seed`, `data.group_by_length`) names it: a
  trial trains only where no such expert exists.
- What chooses between experts (`ROUTING`) changes the pool's router, and trains nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import yaml

from pipeline.config import ConfigError, LearnConfig, TaskConfig
from pipeline.config.loading import field_path, with_values
from tuning.samplers import Range, Sampler, Values, from_plain, from_text

Point = dict[str, Any]
"""One configuration of the space: values by dotted field."""

ROUTING = ("kind", "token_scores", "top_k", "candidates", "temperature", "shrinkage")
"""Router settings that a trial gives its pool."""

TRAINING = ("router.steps", "router.learning_rate", "seed", "data.group_by_length")
"""Fields beside `expert.*` that a training depends on."""

MOST = 1000
"""Points of a grid."""


def _kind(config: LearnConfig) -> str:
    router = config.router
    return f"{router.kind} {router.token_scores}" if router.kind == "token" else router.kind


ACTS: dict[str, tuple[Callable[[LearnConfig], bool], str]] = {
    "router.temperature": (lambda c: c.router.kind != "prompt", "router.kind token or two_level"),
    "router.top_k": (lambda c: c.router.kind == "token", "router.kind token"),
    "router.token_scores": (lambda c: c.router.kind == "token", "router.kind token"),
    "router.candidates": (lambda c: c.router.kind == "two_level", "router.kind two_level"),
    "router.shrinkage": (
        lambda c: _kind(c) != "token phatgoose",
        "router.kind prompt or two_level, or token with token_scores gaussian",
    ),
}
"""Router settings without effect on some routers: when they have one, in code and in words."""


DECIDING = ("router.kind", "router.token_scores")
"""Fields that decide which others act; they come first."""


@dataclass(frozen=True)
class Dimension:
    """One field of a space."""

    name: str
    """Dotted name of the field."""
    sampler: Sampler
    only_if: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of other fields with which this one is tried; with others it is as in the configuration."""
    source: str = ""
    """File or option that says it, for errors."""

    def applies(self, config: LearnConfig) -> bool:
        """Whether the field is tried with this configuration: by its condition, and because its router reads it."""
        given = all(value_of(config, name) in values for name, values in self.only_if.items())
        return given and (self.name not in ACTS or ACTS[self.name][0](config))


@dataclass(frozen=True)
class Space:
    """The fields that a sweep tries, in order: conditions refer to those before, or to the configuration."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def read(cls, file: Path | None, options: Sequence[str]) -> "Space":
        """Reads a file, and options `field=values`, which take the place of the file's; raises ConfigError."""
        dimensions = {} if file is None else {d.name: d for d in _from_file(file)}
        for option in options:
            name, separator, text = option.partition("=")
            where = f"--set {option}"
            if not separator:
                raise ConfigError(f"{where}: write it as FIELD=VALUES, e.g. expert.rank=4,8,16")
            name = field_path(name.strip(), LearnConfig)
            with _named(where):
                dimensions[name] = Dimension(name, from_text(text.strip()), {}, where)
        return cls(tuple(sorted(dimensions.values(), key=lambda d: d.name not in DECIDING)))

    @property
    def names(self) -> list[str]:
        """The fields."""
        return [dimension.name for dimension in self.dimensions]

    def plain(self) -> list[Any]:
        """Returns the JSON-able form, which names the space."""
        return [[d.name, d.sampler.plain(), {n: list(v) for n, v in d.only_if.items()}] for d in self.dimensions]

    def check(self, config: LearnConfig, task: TaskConfig) -> "Space":
        """Returns the space with its values as the configuration reads them; raises ConfigError where one is wrong."""
        if not self.dimensions:
            raise ConfigError("an empty space: name fields with --set FIELD=VALUES, or a file with --space")
        return Space(tuple(d for given in self.dimensions if (d := self._checked(config, given, task)) is not None))

    def _checked(self, config: LearnConfig, dimension: Dimension, task: TaskConfig) -> Dimension | None:
        """Returns a field with its values as the configuration reads them; None where its condition is never met."""
        name, source, sampler = dimension.name, dimension.source, dimension.sampler
        read = [value_of(with_values(config, {name: value}, source), name) for value in _tried(config, dimension)]
        _check_swept(dimension, config, task)
        before = self.names[: self.names.index(name)]
        for other, values in dimension.only_if.items():
            for value in values:
                with_values(config, {other: value}, source)
            if other in self.names and other not in before:
                raise ConfigError(f"{source}: {name}: its condition is on {other}, which must stand above it")
        if not any(dimension.applies(known) for known in self._variants(config, before)):
            if dimension.only_if:
                return None
            raise ConfigError(
                f"{source}: {name} has no effect with router.kind {_kind(config)}, which this pool uses; it acts with "
                f"{ACTS[name][1]}: set that too, or leave it out"
            )
        if isinstance(sampler, Values):
            return Dimension(name, Values(tuple(read), sampler.kind), dimension.only_if, source)
        return dimension

    def _variants(self, config: LearnConfig, names: Sequence[str]) -> Iterator[LearnConfig]:
        """Yields the configuration with every value of the router's fields among `names`, by which others act or not."""
        lists = [d for d in self.dimensions if d.name in names and isinstance(d.sampler, Values)]
        deciding = {name for d in self.dimensions for name in d.only_if} | set(DECIDING)
        chosen = [d for d in lists if d.name in deciding]
        for values in product(*(d.sampler.tried for d in chosen)):
            yield with_values(config, dict(zip([d.name for d in chosen], values, strict=True)), "the space")

    def point(self, config: LearnConfig, drawn: Mapping[str, Any]) -> Point:
        """Returns the drawn values of the fields that apply."""
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.applies(with_values(config, point, "the space")):
                point[dimension.name] = drawn[dimension.name]
        return point

    def grid(self, config: LearnConfig, *, shuffled: bool = False) -> list[Point]:
        """Returns every different combination of the lists; trainings of their own come first, so that none waits.

        They are in the order of the lists, or shuffled by the configuration's seed. Raises ConfigError where there are too
        many, where a field has a range, or where two settings do not fit together.
        """
        count = 1
        for d in self.dimensions:
            if isinstance(d.sampler, Range):
                raise ConfigError(
                    f"{d.source}: {d.name}: a range has no grid; list its values, or take --search random"
                )
            count *= len(d.sampler.values)
        if count > MOST:
            raise ConfigError(
                f"the space has {count:,} combinations, more than {MOST:,}; take --search random --trials N"
            )
        points: dict[str, Point] = {}
        for values in product(*(d.sampler.tried for d in self.dimensions)):
            point = self.point(config, dict(zip(self.names, values, strict=True)))
            with_values(config, point, "the space")
            points.setdefault(repr(point), point)
        if shuffled:
            points = dict(Random(config.seed).sample(list(points.items()), len(points)))
        first: dict[str, str] = {}
        for key, point in points.items():
            first.setdefault(repr(training_of(point)), key)
        return [points[key] for key in first.values()] + [p for k, p in points.items() if k not in first.values()]

    def trainings(self, points: Sequence[Point] | None, trials: int) -> int:
        """Returns how many different trainings there can be at most."""
        if points is not None:
            return len({repr(training_of(point)) for point in points})
        training = [d for d in self.dimensions if is_training(d.name)]
        most = 1
        for d in training:
            most *= len(d.sampler.values) if isinstance(d.sampler, Values) else trials
        return min(most, trials)


def is_training(name: str) -> bool:
    """Whether a training depends on a field."""
    return name.startswith("expert.") or name in TRAINING


def training_of(point: Mapping[str, Any]) -> Point:
    """Returns the values that a training depends on."""
    return {name: value for name, value in point.items() if is_training(name)}


def routing_of(point: Mapping[str, Any]) -> Point:
    """Returns the values that a pool's router depends on."""
    return {name: value for name, value in point.items() if not is_training(name)}


def value_of(config: Any, name: str) -> Any:
    """Returns the value of a dotted field."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _tried(config: LearnConfig, dimension: Dimension) -> tuple[Any, ...]:
    """Returns the values to be checked; raises ConfigError where a range of fractions is given to a field of whole numbers."""
    name, sampler = dimension.name, dimension.sampler
    if isinstance(sampler, Range) and not sampler.whole:
        low, within, high = sampler.tried
        with_values(config, {name: low}, dimension.source)
        with_values(config, {name: high}, dimension.source)
        try:
            with_values(config, {name: within}, dimension.source)
        except ConfigError:
            whole = "lograndint" if sampler.kind == "loguniform" else "randint"
            raise ConfigError(
                f"{dimension.source}: {name} takes whole numbers: write {whole}:{low:g}:{high + 1:g}"
            ) from None
    return sampler.tried


def _check_swept(dimension: Dimension, config: LearnConfig, task: TaskConfig) -> None:
    name, source = dimension.name, dimension.source
    routing = name.startswith("router.") and name.removeprefix("router.") in ROUTING
    if name.startswith("router.") and not routing and not is_training(name):
        raise ConfigError(
            f"{source}: {name} is part of the statistics of every expert in the pool; `pointsman recompute-statistics` gives "
            "all of them another value"
        )
    if not routing and not is_training(name):
        raise ConfigError(
            f"{source}: {name} cannot be swept: a space is of expert.*, router.*, {', '.join(TRAINING[2:])}; change it for all "
            f"trials with {name}=VALUE"
        )
    if name == "seed" and task.validation:
        raise ConfigError(
            f"{source}: seed: it decides which rows task {task.name!r} holds out, and trials are compared by the same ones; "
            "leave `validation` out to sweep it"
        )
    if is_training(name) and task.adapter is not None:
        raise ConfigError(
            f"{source}: {name}: the task's LoRA is given (`adapter`), so that only its router can be swept"
        )
    if name == "router.shrinkage" and config.stream.base_prompts is None:
        raise ConfigError(
            f"{source}: {name}: without stream.base_prompts it is part of every expert's threshold; `pointsman "
            "recompute-statistics` gives all of them another value"
        )


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Turns a ValueError into a ConfigError that begins with its source."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _from_file(file: Path) -> Iterator[Dimension]:
    """Yields the fields of a file."""
    try:
        entries = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file of a space") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{file}: must be a mapping of fields to values, e.g. `expert.rank: [4, 8, 16]`")
    for name, entry in entries.items():
        with _named(f"{file}: {name}"):
            condition: Any = {}
            if isinstance(entry, dict):
                entry = dict(entry)
                condition = entry.pop("if", {})
                if not isinstance(condition, dict):
                    raise ValueError("`if` must be a mapping of fields to values, e.g. {router.kind: token}")
            only_if = {
                field_path(str(other), LearnConfig): tuple(value) if isinstance(value, list) else (value,)
                for other, value in condition.items()
            }
            yield Dimension(field_path(str(name), LearnConfig), from_plain(entry), only_if, f"{file}")
