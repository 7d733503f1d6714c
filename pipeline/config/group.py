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


def without_secrets(path: str) -> str:
    """Returns a path without the keys that a URI may hold."""
    return re.sub(r"://[^/@]*@", "://", path.split("?", 1)[0] if "://" in path else path)


def digest(*parts: Any) -> str:
    """Returns 12 hex digits that name what was computed from `parts` (configs or JSON-able values)."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]
