"""Names of registered models: one per expert, one per pool, one per base.

`<base>.expert.<task>` has a version per training of the task, `<base>.pool.<name>` a version per task learned into the pool,
`<base>.base` a version per checkpoint of the base. Two streams over one base write into one pool only if they name the same.
"""

import re
from typing import Literal, NamedTuple

Kind = Literal["expert", "pool", "base"]

_NAME = re.compile(r"(?P<base>[A-Za-z0-9_.-]+?)\.(?:(?P<kind>expert|pool)\.(?P<own>[A-Za-z0-9_-]+)|base)")


class Named(NamedTuple):
    """What a registered model is, as its name says."""

    kind: Kind
    base: str
    """Label of the base."""
    name: str
    """Task of an expert, name of a pool; empty for a base."""


def expert_name(base_label: str, task: str) -> str:
    """Returns the registered model that holds the experts of a task."""
    return f"{base_label}.expert.{task}"


def pool_name(base_label: str, pool: str) -> str:
    """Returns the registered model that holds a pool's versions."""
    return f"{base_label}.pool.{pool}"


def base_name(base_label: str) -> str:
    """Returns the registered model that holds a base's checkpoints."""
    return f"{base_label}.base"


def read_name(model: str) -> Named | None:
    """Returns what a registered model is; None for one that is not ours, or of an earlier release."""
    match = _NAME.fullmatch(model)
    if match is None:
        return None
    kind: Kind = "base" if match["kind"] is None else "expert" if match["kind"] == "expert" else "pool"
    return Named(kind, match["base"], match["own"] or "")


def no_pool(model: str) -> str:
    """Returns why a registered model that is none of ours for pools is no pool."""
    named = read_name(model)
    what = f"the {named.kind}{f' {named.name}' * bool(named.name)}" if named else "no pool"
    return f"{model!r} is {what}; pools are the versions of <base>.pool.<name>"


def about(model: str) -> str:
    """Returns what a registered model's page says of it."""
    named = read_name(model)
    if named is None:
        return ""
    return {
        "expert": f"LoRA experts for task `{named.name}` over base `{named.base}`: a version per training.",
        "pool": f"Pool `{named.name}` of experts over base `{named.base}`: a version per task learned. `champion` is in use.",
        "base": f"Checkpoints of base `{named.base}`, one version each; pools refer to them.",
    }[named.kind]


class FormerNames(NamedTuple):
    """Registered models of a base in earlier releases: all experts in one, all pools in one."""

    experts: str
    pools: str
    bases: str


def former_names(base_label: str) -> FormerNames:
    """Returns how a base's registered models were called in earlier releases."""
    return FormerNames(f"{base_label}.experts", f"{base_label}.pool", f"{base_label}.bases")
