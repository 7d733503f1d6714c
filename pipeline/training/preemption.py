"""The notice that Ray gives of nodes which are about to be taken away, such as spot instances."""

import time

import ray.train

CHECK_EVERY = 5.0
"""Seconds between checks. All ranks must check together, and a check costs a few milliseconds."""


class PreemptionNotice:
    """Asks Ray Train whether a node of the workers will be taken away."""

    def __init__(self) -> None:
        self._checked_at = time.monotonic()
        self._known: ray.train.PreemptionInfo | None = None

    def due(self) -> bool:
        """Returns whether it is time to check; ranks may differ, and then all of them check."""
        return time.monotonic() - self._checked_at >= CHECK_EVERY

    def given(self) -> bool:
        """Returns whether there is a notice that was not there before, the same on all ranks; all of them call it."""
        self._checked_at = time.monotonic()
        before, self._known = self._known, ray.train.get_preemption_info()
        return self._known is not None and self._known != before
