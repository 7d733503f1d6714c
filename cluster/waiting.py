"""Waits for nodes that an autoscaler may add: visibly, and not for ever.

Placement groups of the job's shape tell the autoscaler what is needed. They are given back when the nodes are there, and Ray
removes them by itself if the driver dies.
"""

import time
from collections.abc import Callable, Sequence

import ray
from ray.util.placement_group import remove_placement_group

from cluster.demand import Group
from cluster.nodes import Node, Supply, cluster_supply, totals
from cluster.preflight import PreflightError

POLL_SECONDS = 1.0

LINE_SECONDS = 15.0
"""Seconds between two lines on how long it has taken."""


def wait_for_nodes(
    lacks: Callable[[Sequence[Node]], str | None],
    wanted: Sequence[Group],
    supply: Supply,
    *,
    seconds: float,
    say: Callable[[str], None],
) -> Supply:
    """Returns the supply when its nodes alive lack nothing; asks the autoscaler for the groups `wanted` meanwhile.

    `lacks` says what nodes lack, None if nothing; `say` is told what is waited for. Raises PreflightError after `seconds`.
    """
    if (missing := lacks(supply.alive)) is None:
        return supply
    began = said = time.monotonic()
    say(f"waiting for {supply.autoscaler}: {_first(missing)}; {seconds:g} s at most (training.node_wait_seconds)")
    asked = [group.place() for group in wanted]
    try:
        while (missing := lacks(supply.alive)) is not None:
            waited = time.monotonic() - began
            if waited >= seconds:
                raise PreflightError(
                    f"{supply.autoscaler} has not added enough nodes in {seconds:g} s: {_first(missing)}\n"
                    "    `ray status` says why it does not; raise training.node_wait_seconds, or ask for less"
                )
            if time.monotonic() - said >= LINE_SECONDS:
                say(f"  still waiting after {waited:.0f} s: {totals(supply.alive)}")
                said = time.monotonic()
            time.sleep(min(POLL_SECONDS, max(0.0, seconds - waited)))
            supply = cluster_supply()
        say(f"  {totals(supply.alive)} after {time.monotonic() - began:.0f} s")
        return supply
    finally:
        if ray.is_initialized():
            for group in asked:
                remove_placement_group(group)


def _first(message: str) -> str:
    return message.splitlines()[0]
