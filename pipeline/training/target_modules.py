"""The Linears that an expert adapts, and those at whose inputs experts are compared."""

import re

from torch import nn

from pipeline.config import ConfigError
from pipeline.models.bases import Base


def adapted_paths(base: Base, pattern: str) -> list[str]:
    """Returns the paths of the Linears that an expert adapts, by `expert.target_modules`.

    `auto` is the regular expression of the base's family. Raises ConfigError if it matches no Linear in full.
    """
    pattern = base.family.linears if pattern == "auto" else pattern
    paths = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]
    if not paths:
        example = next(iter(adapted_paths(base, "auto")))
        raise ConfigError(
            f"expert.target_modules: {pattern!r} matches the full path of no Linear of the base; paths are such as {example}, "
            rf"so that r'.*\.{example.rpartition('.')[2]}' matches, and `auto` is every Linear in the language model's layers"
        )
    return paths


def observed_paths(base: Base, pattern: str) -> list[str]:
    """Returns the Linears whose inputs are evidence: all of the language model, and those that `pattern` adapts.

    Not only the adapted ones: experts that adapt different Linears are compared at all of them.
    """
    wanted = {*adapted_paths(base, "auto"), *adapted_paths(base, pattern)}
    return [name for name, _ in base.model.named_modules() if name in wanted]
