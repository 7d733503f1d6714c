"""What all configurations are made of: frozen groups of fields, their error, and names for what comes out of them."""

import hashlib
import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError


class ConfigError(UserError):
    """A mistake in a configuration file or an override; the message names file, field and remedy."""


class Config(BaseModel):
    """A frozen group of settings; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]
