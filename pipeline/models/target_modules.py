"""The Linears that an expert adapts, and those at whose inputs experts are compared."""

import re

from torch import nn

from pipeline.config import BaseModelConfig, ConfigError
from pipeline.models.bases import Base, empty_model
from pipeline.models.checkpoints import hub_id
from pipeline.models.families import Family
from pipeline.routing.foreign_names import BaseLinears

AUTO = "auto"
"""The regular expression of the base's family: every Linear in the language model's layers."""


def adapted_paths(model: nn.Module, family: Family, pattern: str) -> list[str]:
    """Returns the paths of the Linears that an expert adapts, by `expert.target_modules`.

    Raises ConfigError if the pattern matches no Linear in full.
    """
    wanted = re.compile(family.linears if pattern == AUTO else pattern)
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and wanted.fullmatch(n)]
    if not paths:
        example = next(iter(adapted_paths(model, family, AUTO)))
        raise ConfigError(
            f"expert.target_modules: {pattern!r} matches the full path of no Linear of the base; paths are such as {example}, "
            rf"so that r'.*\.{example.rpartition('.')[2]}' matches, and `auto` is every Linear in the language model's layers"
        )
    return paths


def observed_paths(base: Base, pattern: str) -> list[str]:
    """Returns the Linears at whose inputs statistics are taken: all of the language model, and those that `pattern` adapts.

    Not only the adapted ones: experts that adapt different Linears are compared at all of them.
    """
    wanted = {path for p in (AUTO, pattern) for path in adapted_paths(base.model, base.family, p)}
    return [name for name, _ in base.model.named_modules() if name in wanted]


def check_target_modules(base: BaseModelConfig, pattern: str) -> None:
    """Raises ConfigError if a pattern matches nothing in a base; no weights are read, an 8B base takes two seconds."""
    if pattern != AUTO:
        adapted_paths(*empty_model(base), pattern)


def base_linears(base: BaseModelConfig) -> BaseLinears:
    """Returns the Linears of a base, for adapters that others have trained; no weights are read."""
    model, family = empty_model(base)
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    routable = frozenset(adapted_paths(model, family, AUTO))
    public = hub_id(base.path)
    return BaseLinears(
        shapes, family.language, routable, (public or base.label, base.label), is_public=public is not None
    )
