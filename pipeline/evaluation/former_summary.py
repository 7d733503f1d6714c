"""Summaries that earlier releases wrote, by the names of today."""

from collections.abc import Mapping
from typing import Any

METHODS = {"specialist": "oracle", "token_published": "token_phatgoose"}
"""Methods of a comparison that had another name."""


def by_todays_names(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a summary, of this release or of an earlier one, with the keys and methods of this one."""
    renamed = dict(summary)
    if "accuracy_matrix" in summary:
        renamed["accuracy_matrix"] = _renamed(summary["accuracy_matrix"], {"foundation": "benchmarks"})
    if "continual" in summary:
        renamed["continual"] = _renamed(summary["continual"], {"foundation_retention": "base_retention"})
    if "methods" in summary:
        renamed["methods"] = {
            METHODS.get(name, name): _renamed(method, {"foundation": "base_abilities"})
            for name, method in summary["methods"].items()
        }
    return renamed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
