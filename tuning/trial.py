"""A trial as Tune runs it: asks the driver for its point, and hands its reports to Tune.

It computes nothing, so it holds no more than a token of a CPU: Ray Train books CPUs of its own, and a trial that held some
while its workers wait for them would never end (ray issue 54305). One process serves several trials.
"""

from typing import Any

import ray
from ray import tune

from tuning.trial_queue import FAILURE, NAME

TOKEN = {"cpu": 0.01}
"""What a trial books."""


class TrialError(Exception):
    """Why a trial has failed."""


class Trial(tune.Trainable):
    """One point of the space."""

    def setup(self, config: dict[str, Any]) -> None:
        """Called by Tune, once a process."""
        self._queue = ray.get_actor(NAME)
        self._ask()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune for the next trial of this process."""
        self._ask()
        return True

    def _ask(self) -> None:
        self._number = 0
        ray.get(self._queue.ask.remote(self.trial_id, self.config))

    def step(self) -> dict[str, Any]:
        """Waits for the next report; raises TrialError where the point cannot be trained or evaluated."""
        report = ray.get(self._queue.report.remote(self.trial_id, self._number))
        self._number += 1
        if FAILURE in report:
            raise TrialError(report[FAILURE])
        return dict(report)
