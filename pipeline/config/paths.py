"""The files and folders that a configuration names, so that they can be called otherwise where it is read elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.core import Config
from pipeline.config.loading import group_of


def with_paths(values: Mapping[str, Any], config_class: type[Config], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns unchecked values of a configuration (`read_values`) with `change` applied to those that name files."""
    changed = {}
    for name, value in values.items():
        field = config_class.model_fields.get(name)
        group = group_of(field.annotation) if field is not None else None
        if group is not None:
            changed[name] = _group_with_paths(value, group, change)
        else:
            changed[name] = change(value) if name in config_class.PATHS and isinstance(value, str) else value
    return changed


def _group_with_paths(value: Any, group: type[Config], change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_group_with_paths(entry, group, change) for entry in value]
    if isinstance(value, dict):
        return with_paths(value, group, change)
    # A source can be its path alone.
    return change(value) if isinstance(value, str) and "path" in group.PATHS else value
