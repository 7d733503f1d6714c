"""What all configurations are made of: frozen groups of fields, their error, and names for what comes out of them."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from pipeline.errors import UserError


class ConfigError(UserError):
    """A mistake in a configuration file or an override; the message names file, field and remedy."""


def spelled(pattern: str, rule: str) -> AfterValidator:
    """Returns a check that a text matches `pattern` as a whole; its error says `rule`: "use letters and digits"."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)


RUN_NAME = spelled("[A-Za-z0-9_-]+", "use letters, digits, `_` and `-` only")
"""Check of names that become folders and parts of the registry's names."""


class Config(BaseModel):
    """A frozen group of settings; unknown fields are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    COMMAND: ClassVar[str] = "learn"
    """The command of `pointsman` whose `--help` lists the fields."""
    ALIASES: ClassVar[Mapping[str, str]] = {}
    """Names from PEFT, the HF Trainer and Ray that are accepted for fields."""
    PATHS: ClassVar[frozenset[str]] = frozenset()
    """Fields that name a file or folder, or a URI."""
    FORMER_NAMES: ClassVar[Mapping[str, str]] = {}
    """Names that fields had in earlier releases. They are accepted, and results are still named by them."""
    FORMER_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """The same for values, by field."""

    @model_validator(mode="before")
    @classmethod
    def _by_field_names(cls, values: Any) -> Any:
        return cls.without_aliases(values) if isinstance(values, dict) else values

    @classmethod
    def field_name(cls, name: str) -> str:
        """Returns the name of the field that is meant by an alias or a former name; other names are returned as they are."""
        former = {before: now for now, before in cls.FORMER_NAMES.items()}
        return cls.ALIASES.get(name) or former.get(name) or name

    @classmethod
    def without_aliases(cls, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Returns values by the names of the fields; raises ValueError where one is given twice, with its dotted `prefix`."""
        renamed: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.field_name(key)
            if name in renamed or (name != key and name in values):
                raise ValueError(f"{prefix}{key} and {prefix}{name} are the same field; remove one of them")
            former = {before: now for now, before in cls.FORMER_VALUES.get(name, {}).items()}
            renamed[name] = former.get(value, value) if isinstance(value, str) else value
        return renamed

    def to_identity(self, *, include: set[str] | None = None, exclude: set[str] | None = None) -> dict[str, Any]:
        """Returns the settings, JSON-able, as results are named by them: a field that is renamed renames no result."""
        named = {}
        for name, value in self.model_dump(mode="json", include=include, exclude=exclude).items():
            group = getattr(self, name)
            if isinstance(group, Config):
                value = group.to_identity()
            elif isinstance(group, tuple):
                value = [part.to_identity() if isinstance(part, Config) else part for part in group]
            elif name in self.FORMER_VALUES:
                value = self.FORMER_VALUES[name].get(value, value)
            named[self.FORMER_NAMES.get(name, name)] = value
        return named


_USER = re.compile(r"://(?:[^\s/?#]*|[^\s/@:]+:(?!\d+/)[^\s@]*)@")  # some keys hold a slash
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_KEY = re.compile(
    r"\b([\w-]*(?:token|secret(?:_?key)?|passw(?:or)?d|signature|credential|(?:access|api|account)_?key(?:_?id)?)"
    r"|key|sig|sas|pwd|pass|auth|jwt)(['\"]?\s*[=:]\s*['\"]?)(?!\s)[^\s&'\"]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """Returns a path, or a text with URIs in it, without what may be a key: all that leaves the process goes through here.

    Of a URI goes what stands before the host and after `?` (user, password, keys, signatures); elsewhere the values of
    `token=`, `password=`, `sig=` and the like.
    """
    return _KEY.sub(r"\1\2***", _QUERY.sub(r"\1", _USER.sub("://", text)))


def holds_secrets(text: str) -> bool:
    """Returns whether a path or text holds a user, a password or a key."""
    return bool(_USER.search(text) or _KEY.search(text))


def digest(*parts: Any) -> str:
    """Returns 12 hex digits that name what was computed from `parts` (configs or JSON-able values)."""
    plain = [part.to_identity() if isinstance(part, Config) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]
