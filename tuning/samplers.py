"""How values of a field are drawn: lists and ranges by the names of Ray Tune's own search space.

    4,8,16                 each of them: every one in a grid, else drawn (`choice`)
    choice:4,8,16          drawn
    grid:4,8,16            every one, also under a random search
    uniform:0:0.1          from a range of numbers
    loguniform:1e-4:1e-2   from a range of magnitudes
    randint:4:65           a whole number below the upper end
    lograndint:4:65        the same by magnitude

In YAML a list, or a mapping such as `{loguniform: [1.0e-4, 1.0e-2]}`. Knows nothing of configurations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Values:
    """Some values."""

    values: tuple[Any, ...]
    kind: Literal["list", "choice", "grid"] = "list"

    @property
    def tried(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def domain(self) -> Any:
        """Returns what Tune draws from, or goes through."""
        from ray import tune

        return tune.grid_search(list(self.values)) if self.kind == "grid" else tune.choice(list(self.values))

    def plain(self) -> Any:
        """Returns the JSON-able form, which names it."""
        return {self.kind: list(self.values)}


@dataclass(frozen=True)
class Range:
    """Numbers between two ends."""

    kind: Literal["uniform", "loguniform", "randint", "lograndint"]
    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return self.kind.endswith("randint")

    @property
    def tried(self) -> tuple[Any, ...]:
        """Both ends and, of a range that is not of whole numbers, one number within."""
        if self.whole:
            return int(self.low), int(self.high) - 1
        return self.low, self.low + (self.high - self.low) / math.e, self.high

    def domain(self) -> Any:
        """Returns what Tune draws from."""
        from ray import tune

        ends = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return getattr(tune, self.kind)(*ends)

    def plain(self) -> Any:
        """Returns the JSON-able form, which names it."""
        return {self.kind: [self.low, self.high]}


Sampler = Values | Range

LISTS = ("choice", "grid")
RANGES = ("uniform", "loguniform", "randint", "lograndint")


def from_text(text: str) -> Sampler:
    """Reads what stands behind `field=` on a command line; raises ValueError with the reason."""
    kind, separator, rest = text.partition(":")
    if separator and kind in RANGES:
        return _range(kind, [_value(end) for end in rest.split(":")])
    if separator and kind in LISTS:
        return _values(kind, [_value(part) for part in rest.split(",")])
    if separator and kind.isalpha():
        raise ValueError(f"no sampler {kind!r}; there are: {', '.join((*LISTS, *RANGES))}")
    return _values("list", [_value(part) for part in text.split(",")])


def from_plain(value: Any) -> Sampler:
    """Reads a field's entry in a file of a space, without its condition; raises ValueError with the reason."""
    if isinstance(value, str) and value.partition(":")[0] in (*LISTS, *RANGES):
        return from_text(value)
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise ValueError(f"one sampler per field, found {', '.join(map(str, value)) or 'none'}")
        ((kind, arguments),) = value.items()
        given = list(arguments) if isinstance(arguments, Sequence) and not isinstance(arguments, str) else [arguments]
        if kind in RANGES:
            return _range(kind, given)
        if kind in ("list", *LISTS):
            return _values(kind, given)
        raise ValueError(f"no sampler {kind!r}; there are: {', '.join((*LISTS, *RANGES))}")
    return _values("list", list(value) if isinstance(value, list) else [value])


def _value(text: str) -> Any:
    """Reads a value as YAML, but a number without a point before its exponent as a number too."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not valid YAML: {error}") from None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _values(kind: Any, values: Sequence[Any]) -> Values:
    if not values or any(value is None or value == "" for value in values):
        raise ValueError("give one or more values, separated by commas")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{twice[0]} is there twice")
    return Values(tuple(values), kind)


def _range(kind: Any, ends: Sequence[Any]) -> Range:
    numbers = [end for end in ends if isinstance(end, (int, float)) and not isinstance(end, bool)]
    if len(ends) != 2 or len(numbers) != 2:
        raise ValueError(f"write it as {kind}:LOW:HIGH, with two numbers")
    low, high = numbers
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"{kind} needs a lower and an upper end, found {low:g} and {high:g}")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{kind} needs a lower end above 0, found {low:g}")
    if kind.endswith("randint") and not (float(low).is_integer() and float(high).is_integer()):
        raise ValueError(f"{kind} is of whole numbers, found {low:g} and {high:g}")
    return Range(kind, low, high)
